"""Ranks of a gloo group for test_distributed: one import of torch, then a fork for each rank. `python gloo_ranks.py RANKS FOLDER`."""

import os
import sys
import traceback

import torch
import torch.distributed as dist

from regard.scale import plan_tasks, run_plan, run_plans

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
CASES = {
    "several": ([64, 7, 30, 1, 12, 40], None),
    "one long": ([120], None),
    "a rank with nothing": ([20, 4], 24),
}


def dense(doc_lens, q, k, v):
    from regard.ops import attention, masks

    outs = [attention(*parts, mask=masks.causal) for parts in zip(*(x.split(list(doc_lens), dim=2) for x in (q, k, v)))]
    return torch.cat(outs, dim=2)


def made(doc_lens, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(doc_lens)
    q, k, v = (torch.randn(2, heads, total, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    return (
        q.requires_grad_(),
        k.requires_grad_(),
        v.requires_grad_(),
        torch.randn(q.shape, generator=generator).double(),
    )


def check(rank, plan, whole, out, grads):
    """This rank's share of outputs and gradients is that of dense attention over all."""
    q, k, v, grad = whole
    wanted = dense(plan.doc_lens, q, k, v)
    mine = plan.tokens[rank]
    torch.testing.assert_close(out, wanted[:, :, mine], rtol=1e-9, atol=1e-12)
    for ours, theirs in zip(grads, torch.autograd.grad(wanted, (q, k, v), grad)):
        torch.testing.assert_close(ours, theirs[:, :, mine], rtol=1e-8, atol=1e-11)


def work(rank, ranks):
    parts = []
    for number, (doc_lens, budget) in enumerate(CASES.values()):
        plan = plan_tasks(doc_lens, ranks, budget, tolerance=0.0, **SIZES)
        whole = made(doc_lens, number)
        mine = [x.detach()[:, :, plan.tokens[rank]].requires_grad_() for x in whole[:3]]
        out = run_plan(plan, *mine, group=True)
        grads = torch.autograd.grad(out, mine, whole[3][:, :, plan.tokens[rank]])
        check(rank, plan, whole, out, grads)
        parts.append((plan, whole, mine))
    outs = run_plans([(plan, *mine) for plan, _, mine in parts])
    leaves = [x for _, _, mine in parts for x in mine]
    back = [whole[3][:, :, plan.tokens[rank]] for plan, whole, _ in parts]
    grads = torch.autograd.grad(outs, leaves, back)
    for i, ((plan, whole, _), out) in enumerate(zip(parts, outs)):
        check(rank, plan, whole, out, grads[3 * i : 3 * i + 3])
    wrong = plan_tasks([10], ranks + 1, **SIZES)
    try:
        run_plan(wrong, *mine, group=True)
    except ValueError as error:
        assert f"plan: got '{ranks + 1} ranks', need the group's {ranks}" in str(error)
    else:
        raise AssertionError("a plan for another number of ranks was taken")


def main():
    ranks, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
                work(rank, ranks)
                dist.destroy_process_group()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))


if __name__ == "__main__":
    main()
