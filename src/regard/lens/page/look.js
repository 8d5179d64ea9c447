"use strict";
(async () => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const maps = JSON.parse($("maps").textContent);
  const N = data.tokens.length;
  const state = { probe: Object.keys(data.tables)[0], layer: null, head: null, token: null, held: false };
  const unpacked = new Map();

  // Colours: white to dark through orange and red, even in lightness.
  const stops = [[255, 255, 255], [254, 217, 142], [244, 109, 67], [165, 15, 21], [50, 5, 20]];
  function colour(x) {
    const t = Math.min(1, Math.max(0, x)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(t));
    return stops[i].map((c, k) => Math.round(c + (stops[i + 1][k] - c) * (t - i)));
  }
  const css = (x) => `rgb(${colour(x).join(",")})`;
  $("legend").querySelector("i").style.background = `linear-gradient(90deg,${stops.map((c) => `rgb(${c.join(",")})`).join(",")})`;

  // One layer's rows, inflated when first looked at.
  async function layerRows(index) {
    if (!unpacked.has(index)) {
      const bytes = Uint8Array.from(atob(maps[index]), (c) => c.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      const raw = new Uint8Array(await new Response(stream).arrayBuffer());
      const rows = data.heads * N, view = new DataView(raw.buffer), start = new Uint32Array(rows + 1);
      for (let r = 0; r < rows; r++) start[r + 1] = start[r] + view.getUint16(2 * r, true);
      const total = start[rows], low = 2 * rows, high = low + total, level = high + total;
      unpacked.set(index, (head, row) => {
        const out = [], r = head * N + row;
        for (let e = start[r]; e < start[r + 1]; e++) {
          const w = raw[level + e] / 255;
          out.push([raw[low + e] | (raw[high + e] << 8), w * w]);
        }
        return out;
      });
    }
    return unpacked.get(index);
  }

  // Overview
  function drawGrid() {
    const table = data.tables[state.probe], values = table.flat().filter((v) => v !== null);
    const low = Math.min(...values), high = Math.max(...values), span = high - low || 1;
    $("low").textContent = low.toPrecision(2);
    $("high").textContent = high.toPrecision(2);
    for (const button of $("grid").querySelectorAll("button")) {
      const v = table[button.dataset.row][button.dataset.head];
      button.style.background = v === null ? "#eee" : css((v - low) / span);
      button.style.border = "1px solid #d5d8dc";
      button.title = `layer ${data.layers[button.dataset.row]}, head ${button.dataset.head}: ${state.probe} ${v === null ? "none" : v.toFixed(3)}`;
    }
  }
  function makeGrid() {
    const grid = $("grid");
    grid.style.gridTemplateColumns = `auto repeat(${data.heads}, min-content)`;
    data.layers.forEach((layer, row) => {
      const label = document.createElement("span");
      label.textContent = layer;
      grid.append(label);
      for (let head = 0; head < data.heads; head++) {
        const button = document.createElement("button");
        Object.assign(button.dataset, { row, layer, head });
        button.setAttribute("aria-pressed", "false");
        button.setAttribute("aria-label", `layer ${layer} head ${head}`);
        button.onclick = () => pick(row, head);
        grid.append(button);
      }
    });
    grid.onkeydown = (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!move || state.layer === null) return;
      event.preventDefault();
      const row = (state.layer + move[0] + data.layers.length) % data.layers.length;
      pick(row, (state.head + move[1] + data.heads) % data.heads);
    };
  }

  // One head
  async function pick(row, head) {
    Object.assign(state, { layer: row, head });
    for (const b of $("grid").querySelectorAll("button")) {
      const on = +b.dataset.row === row && +b.dataset.head === head;
      b.setAttribute("aria-pressed", on);
      if (on) b.focus();
    }
    $("which").textContent = `Layer ${data.layers[row]}, head ${head}`;
    $("facts").textContent = Object.entries(data.tables)
      .map(([name, t]) => `${name} ${t[row][head] === null ? "none" : t[row][head].toFixed(3)}`).join(" · ");
    const rows = await layerRows(row);
    if (state.layer !== row || state.head !== head) return;
    const canvas = $("map"), pen = canvas.getContext("2d");
    canvas.width = canvas.height = N;
    const image = pen.createImageData(N, N);
    for (let q = 0; q < N; q++) {
      for (let k = 0; k < N; k++) image.data.set([...(k <= q ? [255, 255, 255] : [246, 247, 249]), 255], 4 * (q * N + k));
      for (const [k, w] of rows(head, q)) image.data.set([...colour(Math.sqrt(w)), 255], 4 * (q * N + k));
    }
    pen.putImageData(image, 0, 0);
    canvas.dataset.ready = `${data.layers[row]}-${head}`;
    await show(state.token ?? N - 1);
  }

  // What one token reads
  async function show(token) {
    state.token = token;
    if (state.layer === null) return;
    const entries = (await layerRows(state.layer))(state.head, token);
    const spans = $("tokens").children;
    for (const span of spans) { span.style.background = ""; span.style.color = ""; span.classList.remove("reader"); }
    for (const [k, w] of entries) {
      const strength = Math.sqrt(w);
      spans[k].style.background = css(strength);
      spans[k].style.color = strength > 0.55 ? "#fff" : "";
    }
    spans[token].classList.add("reader");
    $("reader").textContent = `${JSON.stringify(data.tokens[token])} (token ${token})`;
    const body = $("reads").tBodies[0];
    body.replaceChildren(...entries.sort((a, b) => b[1] - a[1]).slice(0, 10).map(([k, w]) => {
      const row = document.createElement("tr");
      for (const text of [JSON.stringify(data.tokens[k]).slice(1, -1), k, w.toFixed(3)]) row.insertCell().textContent = text;
      const bar = document.createElement("i");
      bar.className = "bar";
      bar.style.width = `${Math.round(w * 120)}px`;
      row.lastChild.append(bar);
      return row;
    }));
    const cross = $("cross");
    cross.style.display = "block";
    cross.style.top = `${((token + 0.5) / N) * 100}%`;
  }
  function makeTokens() {
    data.tokens.forEach((text, i) => {
      const span = document.createElement("span");
      span.textContent = text.replace(/\n/g, "⏎\n") || "∅";
      span.dataset.token = i;
      span.title = `token ${i}`;
      $("tokens").append(span);
    });
    const of = (event) => (event.target.dataset.token === undefined ? null : +event.target.dataset.token);
    $("tokens").onmouseover = (event) => { if (of(event) !== null && !state.held) show(of(event)); };
    $("tokens").onclick = (event) => {
      if (of(event) === null) return;
      state.held = !(state.held && state.token === of(event));
      show(of(event));
    };
  }
  function watchMap() {
    const at = (event) => {
      const box = $("map").getBoundingClientRect();
      const clip = (x) => Math.min(N - 1, Math.max(0, Math.floor(x * N)));
      return [clip((event.clientY - box.top) / box.height), clip((event.clientX - box.left) / box.width)];
    };
    $("map").onmousemove = async (event) => {
      if (state.layer === null) return;
      const [q, k] = at(event), found = (await layerRows(state.layer))(state.head, q).find(([c]) => c === k);
      const weight = k > q ? "not visible" : found ? found[1].toFixed(3) : `below ${data.smallest.toFixed(4)} or beyond the largest`;
      $("cell").textContent = `${JSON.stringify(data.tokens[q])} (${q}) reads ${JSON.stringify(data.tokens[k])} (${k}): ${weight}`;
      if (!state.held) show(q);
    };
    $("map").onclick = (event) => { state.held = true; show(at(event)[0]); };
  }

  for (const name of Object.keys(data.tables)) $("probe").add(new Option(name, name));
  $("probe").onchange = () => { state.probe = $("probe").value; drawGrid(); };
  makeGrid(); makeTokens(); watchMap(); drawGrid();
  document.body.dataset.ready = "yes";
})();
