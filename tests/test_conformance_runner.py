"""The conformance runner itself, on folders made here: what it runs, what it must notice, and `regard verify` over them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from regard.bench.conformance import compare, find_checks, read_vector, resolve, run_all, run_check, uncompared
from regard.cli import app

REPO = Path(__file__).parents[1]


def save(folder, stem, tensors, **meta):
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()}
    path = folder / f"{stem}.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, str(path), metadata=metadata)
    return path


def linear_vector(folder, stem="004-linear"):
    """A vector of one linear layer: output and gradients, with its constructor's arguments under other names."""
    torch.manual_seed(1)
    layer = nn.Linear(5, 3)
    x, upstream = torch.randn(4, 5, requires_grad=True), torch.randn(4, 3)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, upstream)
    tensors = {
        "in.x": x.detach(),
        "in.up": upstream,
        "param.l.weight": layer.weight.detach(),
        "out.y": y.detach(),
        "out.dx": dx,
    }
    tensors["param.l.bias"] = layer.bias.detach()
    return save(folder, stem, tensors, paper="004", official_kwargs={"d_in": 5, "d_out": 3, "seed": 7})


LINEAR = """
["004-linear"]
target = "torch.nn.Linear"
kwargs_from = "official_kwargs"
kwargs_rename = { d_in = "in_features", d_out = "out_features", seed = "" }
params = "l."
inputs = ["x"]
outputs = { "0" = "y" }
grads = { dx = "x" }
grad_out = "up"
"""


def test_class_with_renamed_kwargs_params_and_gradients(tmp_path):
    linear_vector(tmp_path / "vectors")
    (tmp_path / "targets.toml").write_text(LINEAR)
    (check,) = find_checks(tmp_path)
    compared = run_check(check)
    assert [row.output for row in compared] == ["y", "dx"]
    assert all(row.ok for row in compared)
    assert uncompared(run_all([check])) == {}


def test_wrong_numbers_and_wrong_shapes_are_noticed():
    theirs = torch.tensor([2.0, -4.0])
    near, far = theirs * (1 + 0.9e-5), theirs + torch.tensor([0.0, 5e-5])
    assert compare("y", near, theirs).ok
    row = compare("y", far, theirs)
    assert not row.ok and row.error == pytest.approx(1.25e-5, rel=0.05) and "allowed 4e-05" in row.detail
    assert compare("y", far, theirs, atol=1e-4).ok
    assert "shape (2, 1), need (2,)" in compare("y", theirs[:, None], theirs).detail
    assert not compare("y", torch.tensor([2.0, float("nan")]), theirs).ok
    inf = torch.tensor([1.0, float("-inf")])
    assert compare("y", inf.clone(), inf).ok and not compare("y", theirs, inf).ok and not compare("y", -inf, inf).ok
    assert compare("y", torch.zeros(0, 3), torch.zeros(0, 3)).ok


def test_whole_numbers_must_be_equal():
    theirs = torch.tensor([3, 1_000_000])
    assert compare("i", theirs.int(), theirs).ok
    assert not compare("i", theirs + 1, theirs, rtol=0.1, atol=5.0).ok
    assert not compare("b", torch.tensor([True, True]), torch.tensor([True, False])).ok


def test_function_with_keyword_inputs_and_lists_of_tensors(tmp_path):
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    save(tmp_path, "005-cat", {"in.0": a, "in.1": b, "out.0": torch.cat([a, b], dim=1)})
    (tmp_path / "targets.toml").write_text(
        '["005-cat"]\ntarget = "torch.cat"\ninputs = {tensors = ["0", "1"]}\nkwargs = {dim = 1}\n'
    )
    assert all(row.ok for row in run_check(*find_checks(tmp_path)))


def test_train_mode_method_cases_and_nested_outputs(tmp_path):
    x = torch.randn(6, 4)
    bn = nn.BatchNorm1d(4)
    params = {f"param.{name}": value.clone() for name, value in bn.state_dict().items() if "tracked" not in name}
    tensors = {"in.x": x, **params, "out.train": bn(x).detach(), "out.eval": nn.BatchNorm1d(4).eval()(x).detach()}
    save(tmp_path, "006-bn", tensors)
    values, indices = x.max(dim=0)
    save(tmp_path, "006-max", {"in.x": x, "out.v": values, "out.i": indices})
    (tmp_path / "targets.d").mkdir()
    (tmp_path / "targets.d" / "a.toml").write_text(
        '["006-bn"]\ntarget = "torch.nn.BatchNorm1d"\nkwargs = {num_features = 4}\nmethod = "forward"\n'
        '["006-bn".cases.train]\ntrain = true\noutputs = {"0" = "train"}\n'
        '["006-bn".cases.eval]\noutputs = {"0" = "eval"}\n'
    )
    (tmp_path / "targets.d" / "b.toml").write_text(
        '["006-max"]\ntarget = "torch.max"\ninputs = ["x"]\nkwargs = {dim = 0}\noutputs = {values = "v", "1" = "i"}\n'
    )
    results = run_all(find_checks(tmp_path))
    assert [result.check.name for result in results] == ["006-bn:eval", "006-bn:train", "006-max"]
    assert all(result.ok for result in results), [result.detail for result in results]


def test_modules_take_the_dtype_of_the_recorded_parameters(tmp_path):
    layer = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    tensors = {"in.input": x, "out.0": layer(x).detach(), **{f"param.{k}": v for k, v in layer.state_dict().items()}}
    save(tmp_path, "007-double", tensors)
    (tmp_path / "targets.toml").write_text(
        '["007-double"]\ntarget = "torch.nn.Linear"\nkwargs = {in_features = 3, out_features = 2}\nrtol = 1e-14\n'
    )
    (row,) = run_check(*find_checks(tmp_path))
    assert row.ok, row.detail


def test_adapter_gets_the_case_and_its_outputs_are_compared(tmp_path):
    x = torch.randn(3)
    save(tmp_path, "008-adapt", {"in.x": x, "param.w": x, "out.y": 2 * x, "out.z": x}, paper="008", args={"times": 2})
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "eight.py").write_text(
        "def run(case):\n"
        "    assert case.meta['paper'] == '008' and case.kwargs == {'k': 1} and list(case.params) == ['w']\n"
        "    return {'y': case.inputs['x'] * case.args['times']}\n"
    )
    (tmp_path / "targets.toml").write_text('["008-adapt"]\nadapter = "adapters/eight.py:run"\nkwargs = {k = 1}\n')
    (result,) = run_all(find_checks(tmp_path))
    assert result.ok, result.detail
    assert uncompared([result]) == {"008-adapt": ["z"]}


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ("", "no target"),
        ('["004-linear"]\ntarget = "torch.nn.Linear"\nrtoll = 1.0', "unknown key rtoll"),
        ('["004-linear"]\nkwargs = {a = 1}', "need either a target or an adapter"),
        ('["004-linear"]\ntarget = "torch.nn.NoSuchLayer"', "'torch.nn.NoSuchLayer' is not there"),
        ('["004-linear"]\ntarget = "no_such_package.layer"', "is not there"),
        ('["004-linear"]\nadapter = "adapters/none.py:run"', "adapter: 'adapters/none.py:run' is not there"),
        (LINEAR.replace('["x"]', '["y"]'), "in.y is not recorded; there is up, x"),
        (LINEAR.replace('"0" = "y"', '"0" = "other"'), "out.other is not recorded"),
        (LINEAR.replace('"0" = "y"', '"state" = "y"'), "ours has no 'state'"),
        (LINEAR.replace('"l."', '"m."'), "nothing recorded below param.m."),
        (LINEAR.replace('"l."', '""'), "missing weight, bias; unexpected l.bias, l.weight"),
        ("not toml at all", "cannot be read"),
        ('outside = 1\n["004-linear"]\ntarget = "torch.nn.Linear"', "outside a table"),
    ],
)
def test_mistakes_in_target_files_are_named_and_fail(tmp_path, table, complaint):
    linear_vector(tmp_path)
    (tmp_path / "targets.toml").write_text(table)
    results = run_all(find_checks(tmp_path))
    details = " | ".join(result.detail for result in results if not result.ok)
    assert complaint in details


def test_target_without_vector_and_vector_described_twice_fail(tmp_path):
    linear_vector(tmp_path)
    (tmp_path / "targets.toml").write_text(LINEAR + '["009-gone"]\ntarget = "torch.cat"\n')
    (tmp_path / "targets.d").mkdir()
    (tmp_path / "targets.d" / "again.toml").write_text(LINEAR)
    details = {result.check.name: result.detail for result in run_all(find_checks(tmp_path))}
    assert details == {
        "004-linear": "described twice in the target files",
        "009-gone": "no such vector: 009-gone.safetensors",
    }


def test_errors_of_the_code_under_test_are_its_result_and_the_rest_still_runs(tmp_path):
    linear_vector(tmp_path)
    save(tmp_path, "005-raise", {"in.x": torch.zeros(2), "out.0": torch.zeros(2)})
    (tmp_path / "targets.toml").write_text(LINEAR + '["005-raise"]\ntarget = "operator.truediv"\ninputs = ["x"]\n')
    good, bad = run_all(find_checks(tmp_path))
    assert good.ok and not bad.ok and bad.detail.startswith("TypeError: ")


@pytest.mark.parametrize("damage", ["truncated", "empty", "pickle", "header"])
def test_damaged_vectors_are_refused_by_name(tmp_path, damage):
    path = linear_vector(tmp_path)
    (tmp_path / "targets.toml").write_text(LINEAR)
    data = path.read_bytes()
    if damage == "pickle":
        torch.save({"in.x": torch.zeros(1)}, path)
    else:
        path.write_bytes({"truncated": data[:-7], "empty": b"", "header": b"\xff" * 16 + data[16:]}[damage])
    with pytest.raises(ValueError, match=r"004-linear\.safetensors: cannot be read as safetensors"):
        read_vector(path)
    (result,) = run_all(find_checks(tmp_path))
    assert not result.ok and "cannot be read as safetensors" in result.detail


def test_vectors_must_name_their_parts_and_hold_outputs(tmp_path):
    with pytest.raises(ValueError, match=r"need a name that begins with in\., param\. or out\."):
        read_vector(save(tmp_path, "a", {"x": torch.zeros(1)}))
    with pytest.raises(ValueError, match="nothing to compare"):
        read_vector(save(tmp_path, "b", {"in.x": torch.zeros(1)}))
    with pytest.raises(ValueError, match="'args' is no JSON"):
        read_vector(save(tmp_path, "c", {"out.x": torch.zeros(1)}, args="{"))


def test_folders_without_vectors_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no \\*.safetensors"):
        find_checks(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        find_checks(tmp_path / "none")


def test_resolve_reaches_through_lazy_packages_into_classes():
    assert resolve("torch.nn.Linear.forward") is nn.Linear.forward
    import regard

    assert resolve("regard.load_official") is regard.load_official


def verify(*arguments):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)], env={"COLUMNS": "120"})


def test_verify_prints_a_table_and_succeeds(tmp_path):
    linear_vector(tmp_path)
    (tmp_path / "targets.toml").write_text(LINEAR)
    done = verify("moh", "--vectors", tmp_path)
    assert done.exit_code == 0, done.output
    assert "004-linear" in done.output and "1e-05" in done.output and "1 of 1 agree" in done.output


def test_verify_fails_on_a_wrong_number_and_on_a_vector_without_a_target(tmp_path):
    path = linear_vector(tmp_path)
    wrong = {name: tensor for part, kind in (("in", "inputs"), ("param", "params"), ("out", "outputs")) for name, tensor in
             ((f"{part}.{key}", value) for key, value in getattr(read_vector(path), kind).items())}  # fmt: skip
    wrong["out.y"] = wrong["out.y"] + 1e-3
    save(tmp_path, "004-linear", wrong, official_kwargs={"d_in": 5, "d_out": 3, "seed": 7})
    save(tmp_path, "005-new", {"out.0": torch.zeros(1)})
    (tmp_path / "targets.toml").write_text(LINEAR)
    done = verify("--vectors", tmp_path, "--json")
    assert done.exit_code == 1
    first, second = json.loads(done.output)
    assert first["paper"] == "004" and first["output"] == "y" and not first["ok"] and first["max_rel_error"] > 1e-4
    assert second["vector"] == "005-new" and not second["ok"] and "no target" in second["detail"]
    assert "NO" in verify("--vectors", tmp_path).output


def test_verify_names_what_it_cannot_do(tmp_path, monkeypatch):
    linear_vector(tmp_path)
    assert "no vector of paper 022" in str(verify("022", "--vectors", tmp_path).exception)
    assert "did you mean 068 duoattention" in str(verify("duoatention", "--vectors", tmp_path).exception)
    assert "is no folder" in str(verify("--vectors", tmp_path / "none").exception)


def test_verify_finds_the_checkout_and_says_when_there_is_none(tmp_path, monkeypatch):
    from regard.bench import verify as module

    monkeypatch.chdir(REPO / "tests")
    assert module.default_folder() == REPO / "tests" / "conformance"
    monkeypatch.chdir(tmp_path)
    assert module.default_folder() == REPO / "tests" / "conformance"
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site-packages" / "regard" / "bench" / "verify.py"))
    with pytest.raises(ValueError, match="an installed wheel carries no vectors"):
        module.default_folder()


def test_pytest_runs_any_other_folder(tmp_path):
    linear_vector(tmp_path / "vectors")
    save(tmp_path / "vectors", "005-new", {"out.0": torch.zeros(1)})
    (tmp_path / "targets.toml").write_text(LINEAR)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/conformance",
        "--vectors",
        str(tmp_path),
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert "1 failed, 1 passed" in done.stdout and "005-new: no target" in done.stdout, done.stdout + done.stderr

    command[command.index(str(tmp_path))] = str(tmp_path / "none")
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode != 0 and "is no folder" in done.stdout + done.stderr
