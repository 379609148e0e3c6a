"use strict";
// The explorer of a section: exact, approximation and difference side by side, at one scale, with one view and one cursor.
// Written here rather than with Vega-Lite, Observable Plot or Plotly, which weigh 0.8 to 3.5 MB of the page's 5: what it
// takes is pixels from arrays and three canvases with one view, a few hundred lines, and less than they would need around them.

const NOTHING = { n: 1, m: 1, largest: [NaN], mean: [NaN], gapLargest: [NaN], gapMean: [NaN] };
const LEAST = 3; // entries that fill a panel at the closest zoom

class Explorer {
  constructor(root, data, colors) {
    this.root = root;
    this.section = root.dataset.section;
    this.data = data;
    this.colors = colors;
    this.blocks = new Matrices(data);
    this.cells = new Matrices(data, true);
    this.canvases = [...root.querySelectorAll(".panel canvas")];
    this.stage = root.querySelector(".panels");
    this.map = root.querySelector(".map canvas");
    this.fields = Object.fromEntries([...root.querySelectorAll("[data-field]")].map((e) => [e.dataset.field, e]));
    this.said = root.querySelector("[role=status]");
    const kind = Object.keys(data.kinds)[0];
    this.first = { method: Object.keys(data.kinds[kind]).find((name) => name !== "exact"), kind, order: "unit", scale: "log", cell: "largest", row: "", col: "", view: null };
    this.state = { ...this.first };
    this.cursor = null;
    this.pointers = new Map();
    this.scales = new Map();
    this.mirrors = new Map();
    this.coarser = new Map();
    this.round = 0;
  }

  // Root mean squares have one cell for each block.
  get matrices() {
    return this.state.kind === "rms" ? this.cells : this.blocks;
  }

  async start() {
    await this.blocks.prepare();
    listen(this);
    this.root.classList.add("live");
    await this.restore();
    new ResizeObserver(() => this.draw()).observe(this.stage);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // ---- state, and the address that holds it ----

  async restore() {
    const given = new URLSearchParams(location.hash.slice(1));
    if (given.get("section") === this.section) {
      const names = this.data.layers.map((layer) => layer.name);
      const has = (key, among) => (among.includes(given.get(key)) ? given.get(key) : this.first[key]);
      const block = (given.get("block") || "").split("/").map(decodeURIComponent).map((name) => names.indexOf(name));
      const whole = block.length !== 2 || block.includes(-1);
      const view = (given.get("view") || "").split(",").map(Number);
      this.state = {
        method: has("method", this.data.methods), kind: has("kind", Object.keys(this.data.kinds)),
        order: has("order", [...this.fields.order.options].map((o) => o.value)),
        scale: has("scale", [...this.fields.scale.options].map((o) => o.value)),
        cell: has("cell", ["largest", "mean"]), row: whole ? "" : String(block[0]), col: whole ? "" : String(block[1]),
        view: view.length === 4 && view.every(Number.isFinite) && view[2] > 0 && view[3] > 0
          ? { x: view[0], y: view[1], w: view[2], h: view[3] } : null,
      };
    }
    await this.show();
  }

  remember() {
    const { method, kind, order, scale, cell, row, col, view } = this.state;
    const name = (i) => encodeURIComponent(this.data.layers[i].name);
    const block = row === "" ? "all" : `${name(row)}/${name(col)}`;
    const parts = { section: this.section, block, method, kind, order, scale, cell };
    const whole = view.w === this.scene.width && view.h === this.scene.height;
    if (!whole) parts.view = [view.x, view.y, view.w, view.h].map((v) => Number(v.toFixed(2))).join(",");
    history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
  }

  async set(change) {
    Object.assign(this.state, change);
    await this.show();
    this.remember();
  }

  // ---- what is shown ----

  async show() {
    const round = ++this.round, { kind } = this.state, known = this.data.kinds[kind];
    for (const option of this.fields.method.options) option.disabled = !(option.value in known);
    if (!(this.state.method in known)) this.state.method = Object.keys(known).find((name) => name !== "exact");
    const { method } = this.state;
    const [exact, own] = [await this.matrices.of(kind, "exact"), await this.matrices.of(kind, method)];
    if (round !== this.round) return; // something else was chosen meanwhile
    this.held = [exact, own, own];
    this.scene = this.sceneOf(own);
    const { width, height } = this.scene, view = this.state.view;
    this.state.view = view ? this.kept(view) : { x: 0, y: 0, w: width, h: height };
    for (const [name, field] of Object.entries(this.fields)) field.value = this.state[name];
    for (const name of ["order", "cell"]) this.fields[name].disabled = this.matrices.single;
    if (this.cursor && (this.cursor.row >= height || this.cursor.col >= width)) this.cursor = null;
    this.draw();
  }

  sceneOf(blocks) {
    const { row, col, order } = this.state, { sizes, offsets } = this.matrices, all = sizes.map((_, i) => i);
    const pieces = (chosen) => {
      const list = chosen === "" ? all : [Number(chosen)], begin = chosen === "" ? 0 : offsets[chosen];
      return list.map((i) => ({ layer: i, start: offsets[i] - begin, end: offsets[i + 1] - begin }));
    };
    const [rows, cols] = [pieces(row), pieces(col)];
    const orders = new Map(), cut = this.data.layers;
    return {
      rows, cols, height: rows.at(-1).end, width: cols.at(-1).end,
      block: (i, j) => this.block(blocks, i, j),
      order: (i) => orders.get(i) || orders.set(i, this.matrices.permutation(i, order)).get(i),
      step: (i) => (this.matrices.single || order === "torch" ? 0 : order === "unit" ? cut[i].inputs : cut[i].units),
    };
  }

  // The block of any two layers as it is shown; below the diagonal it is the mirror of one above.
  block(blocks, i, j) {
    if (i <= j) return this.levelled(blocks.get(`${i},${j}`), i, j);
    const source = blocks.get(`${j},${i}`);
    if (!this.mirrors.has(source)) this.mirrors.set(source, this.mirrored(source));
    return this.levelled(this.mirrors.get(source), i, j);
  }

  mirrored({ n, m, factor, largest, mean, gapLargest, gapMean }) {
    const flip = (values) => values && transposed(values, n, m);
    return { n: m, m: n, factor, largest: flip(largest), mean: flip(mean), gapLargest: flip(gapLargest), gapMean: flip(gapMean) };
  }

  // Neighbours are comparable: beside cells of several entries, single ones become such cells too; and cells, which are
  // those of unit order, are not shown in another.
  levelled(block, i, j) {
    const factor = this.level, size = (k) => this.matrices.sizes[k];
    if (block.factor > 1 && this.state.order !== "unit") return { ...NOTHING, factor: Math.max(size(i), size(j)) };
    if (block.factor > 1 || factor === 1 || this.state.order !== "unit") return block;
    if (!this.coarser.has(block)) {
      const [largest, mean] = cellsOf(block.largest, block.n, block.m, factor);
      const [gapLargest, gapMean] = block.gapMean ? cellsOf(block.gapMean, block.n, block.m, factor) : [null, null];
      const [n, m] = [block.n, block.m].map((count) => Math.ceil(count / factor));
      this.coarser.set(block, { n, m, factor, largest, mean, gapLargest, gapMean });
    }
    return this.coarser.get(block);
  }

  // Entries per cell and side of the coarsest block in view.
  resolve() {
    const { view } = this.state, { within, between } = this.matrices.layout;
    const seen = (pieces, low, span) => pieces.filter(({ start, end }) => end > low && start < low + span).map((p) => p.layer);
    const [rows, cols] = [seen(this.scene.rows, view.y, view.h), seen(this.scene.cols, view.x, view.w)];
    const mixed = rows.some((i) => cols.some((j) => i !== j));
    this.level = mixed ? between : within;
  }

  arrays() {
    const mean = this.state.cell === "mean";
    const own = (block) => (mean ? block.mean : block.largest), gap = (block) => (mean ? block.gapMean : block.gapLargest);
    return [own, own, gap];
  }

  scale() {
    const { kind, scale, cell, row, col, order } = this.state, key = [kind, cell, row, col, order, this.level].join(" ");
    const scene = { ...this.scene, block: (i, j) => this.block(this.held[0], i, j) };
    if (!this.scales.has(key)) this.scales.set(key, extent(scene, this.arrays()[0]));
    const { top, largest } = this.scales.get(key);
    return scaleOf(scale, top, largest);
  }

  draw() {
    if (!this.scene) return;
    this.resolve();
    const scale = this.scale(), style = getComputedStyle(this.root), dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const colors = scale.signed ? this.colors[dark ? "dark" : "diverging"] : this.colors.sequential;
    const line = scale.signed && !dark ? "#000000" : "#ffffff", { view, cell } = this.state;
    this.canvases.forEach((canvas, k) => {
      const side = Math.max(60, Math.round(canvas.clientWidth * Math.min(2, devicePixelRatio || 1)));
      if (canvas.width !== side) canvas.width = canvas.height = side;
      const context = canvas.getContext("2d"), image = context.createImageData(side, side);
      const scene = { ...this.scene, block: (i, j) => this.block(this.held[k], i, j) };
      paint(image, scene, view, scale, colors, this.arrays()[k], cell === "mean");
      context.putImageData(image, 0, 0);
      context.lineWidth = 1;
      rule(context, this.scene, view, line);
      if (k === 0) label(context, this.scene, view, this.data.layers.map((layer) => layer.label));
      if (this.cursor) mark(context, view, this.cell(), style.getPropertyValue("--accent"), line === "#ffffff" ? "#000000" : "#ffffff");
    });
    this.legend(scale, colors);
    this.navigate();
    this.tell();
  }

  legend(scale, colors) {
    const ramp = this.root.querySelector(".ramp canvas"), context = ramp.getContext("2d");
    ramp.width = 256;
    ramp.height = 1;
    const image = context.createImageData(256, 1), pixels = new Uint32Array(image.data.buffer);
    for (let x = 0; x < 256; x++) pixels[x] = colors[Math.round((x / 255) * (colors.length - 1))];
    context.putImageData(image, 0, 0);
    const numbers = this.root.querySelector(".ramp .ticks");
    numbers.replaceChildren(...scale.numbers.map((text) => Object.assign(document.createElement("span"), { textContent: text })));
  }

  // The layer × layer map: means of |entries| or root mean squares, logarithmic, with what the panels show framed.
  navigate() {
    const means = this.blocks.means[this.state.kind], count = this.data.layers.length, { row, col } = this.state;
    const side = (this.map.width = this.map.height = Math.round(this.map.clientWidth * 2) || 280), context = this.map.getContext("2d");
    const largest = Math.max(...means), low = Math.log10(largest) - 4, size = side / count;
    means.forEach((value, k) => {
      const place = value > 0 ? Math.min(1, Math.max(0, (Math.log10(value) - low) / 4)) : 0;
      const color = this.colors.sequential[Math.round(place * (this.colors.sequential.length - 1))];
      context.fillStyle = `rgb(${color & 255} ${(color >> 8) & 255} ${(color >> 16) & 255})`;
      const [i, j] = [Math.floor(k / count), k % count], gap = count > 24 ? 0 : 2;
      context.fillRect(Math.round(j * size), Math.round(i * size), Math.ceil(size) - gap, Math.ceil(size) - gap);
    });
    const { offsets } = this.matrices, { view } = this.state, begin = (chosen) => (chosen === "" ? 0 : offsets[chosen]);
    const place = (at) => {
      const i = Math.max(0, offsets.findLastIndex((offset, k) => offset <= at && k < count));
      return (i + Math.min(1, (at - offsets[i]) / (offsets[i + 1] - offsets[i]))) * size;
    };
    const [x, y] = [place(begin(col) + view.x), place(begin(row) + view.y)];
    const [right, bottom] = [place(begin(col) + view.x + view.w), place(begin(row) + view.y + view.h)];
    for (const [color, width] of [["#000", 7], ["#fff", 3]]) {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.strokeRect(x + 3, y + 3, Math.max(4, right - x - 6), Math.max(4, bottom - y - 6));
    }
  }

  // ---- the cursor, and what is read there ----

  place(at, pieces) {
    const piece = pieces.find(({ start, end }) => at >= start && at < end) || pieces.at(-1);
    return { ...piece, at: at - piece.start };
  }

  cell() {
    const [row, col] = [this.place(this.cursor.row, this.scene.rows), this.place(this.cursor.col, this.scene.cols)];
    const { n, m, factor } = this.scene.block(row.layer, col.layer);
    const a = Math.min(n - 1, Math.floor(row.at / factor)), b = Math.min(m - 1, Math.floor(col.at / factor));
    const y = row.start + a * factor, x = col.start + b * factor;
    return {
      row, col, a, b, n, m, factor, x, y,
      w: Math.min(factor, col.end - x), h: Math.min(factor, row.end - y),
    };
  }

  // The values at the cursor and the words for where it is.
  reading() {
    const { row, col, a, b, m, factor, y, x, h, w } = this.cell(), { layers } = this.data, { single } = this.matrices;
    const order = [this.scene.order(row.layer), this.scene.order(col.layer)];
    const at = factor === 1 ? order[0][a] * m + order[1][b] : a * m + b;
    const values = this.arrays().map((value, k) => value(this.block(this.held[k], row.layer, col.layer))[at]);
    const words = [[row, y, h, order[0]], [col, x, w, order[1]]].map(([piece, from, count, index]) => {
      const name = layers[piece.layer].name || "(root)", start = from - piece.start;
      if (single || (count > 1 && count === piece.end - piece.start)) return name;
      const first = this.matrices.parameter(piece.layer, index[start]);
      if (count === 1) return `${name}, ${first}`;
      return `${name}, ${first} to ${this.matrices.parameter(piece.layer, index[start + count - 1])}`;
    });
    const mean = this.state.cell === "mean";
    const what = Number.isNaN(values[0]) ? "Not held in this order"
      : single ? "Root mean square of the block’s entries"
      : factor === 1 ? "Entry" : mean ? `Mean of ${h} × ${w} entries` : `Largest of ${h} × ${w} entries, in each picture its own`;
    return { values, words, what };
  }

  tell(aloud = false) {
    const table = this.root.querySelector(".reading"), names = ["what", "row", "col", "exact", "own", "gap"];
    const put = (name, text) => (table.querySelector(`[data-read=${name}]`).textContent = text);
    this.root.querySelectorAll("[data-name=method]").forEach((e) => (e.textContent = this.state.method));
    this.root.querySelector(".resolution").textContent = this.resolution();
    this.root.querySelectorAll(".rounding").forEach((e) => (e.hidden = this.matrices.single));
    table.classList.toggle("empty", !this.cursor);
    if (!this.cursor) return names.forEach((name) => put(name, name === "what" ? "Point at a cell, or press an arrow key." : "–"));
    const { values, words, what } = this.reading();
    const texts = [what, ...words, ...values.map((value) => (Number.isNaN(value) ? "–" : shown(value)))];
    names.forEach((name, k) => put(name, texts[k]));
    Object.assign(table.dataset, { exact: values[0], own: values[1], gap: values[2] });
    if (aloud) {
      this.said.textContent = `${what}. Row ${words[0]}. Column ${words[1]}. Exact ${texts[3]}, ${this.state.method} ${texts[4]}, difference ${texts[5]}.`;
    }
  }

  resolution() {
    const { sizes, single, layout: { within, between } } = this.matrices, factor = this.level, count = (n) => n.toLocaleString("en");
    if (single) {
      return "Each cell is the root mean square of a block’s entries, exact though the matrix is never written out; layers are drawn "
        + `equally wide. ${this.data.layout ? "Single entries of a sample are in the list of matrices." : "Single entries were not saved."}`;
    }
    if (this.data.parameters) {
      return `A sample of ${count(sizes.reduce((sum, size) => sum + size))} of ${count(this.data.parameters)} parameters: of each layer, output units and inputs `
        + "chosen at random, every entry between them. Layers are as wide as their part of it, damped inverses are left out, "
        + "and the map shows root mean squares of whole blocks. fisherviz.plot.heatmap(fisher, layers=[…]) draws chosen layers.";
    }
    if (factor === 1) return "Every entry is here.";
    const whole = within === 1 ? " Inside a layer’s own block every entry is here: enter it, or zoom in." : "";
    if (this.state.order === "unit") return `A cell covers ${factor} × ${factor} entries.${whole}`;
    const where = within === 1 ? "between layers" : "of this network";
    return `Blocks ${where} are held as cells of ${between} × ${between} entries by output unit, and are empty in this order.${whole}`;
  }

  // ---- zoom and pan ----

  kept(view) {
    const { width, height } = this.scene;
    const w = Math.min(width, Math.max(Math.min(width, LEAST), view.w)), h = Math.min(height, Math.max(Math.min(height, LEAST), view.h));
    return { w, h, x: Math.min(width - w, Math.max(0, view.x)), y: Math.min(height - h, Math.max(0, view.y)) };
  }

  look(view) {
    this.state.view = this.kept(view);
    const { width, height } = this.scene, { w, h } = this.state.view;
    this.stage.classList.toggle("zoomed", w < width || h < height);
    if (!this.waiting) {
      this.waiting = requestAnimationFrame(() => {
        this.waiting = null;
        this.draw();
        this.remember();
      });
    }
  }

  zoom(times, at) {
    const { x, y, w, h } = this.state.view, { width, height } = this.scene;
    const scale = Math.max(Math.min(LEAST, width) / w, Math.min(LEAST, height) / h, Math.min(times, Math.max(width / w, height / h)));
    const [px, py] = at || (this.cursor ? [(this.cursor.col + 0.5 - x) / w, (this.cursor.row + 0.5 - y) / h] : [0.5, 0.5]);
    const [fx, fy] = [px, py].map((part) => Math.min(1, Math.max(0, part)));
    this.look({ x: x + fx * w * (1 - scale), y: y + fy * h * (1 - scale), w: w * scale, h: h * scale });
  }

  point(event, canvas) {
    const box = canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  aim([px, py], aloud = false) {
    const { x, y, w, h } = this.state.view, { width, height } = this.scene;
    const inside = (value, end) => Math.min(end - 1, Math.max(0, Math.floor(value)));
    this.cursor = { row: inside(y + py * h, height), col: inside(x + px * w, width) };
    this.draw();
    this.tell(aloud);
  }

  step([down, right]) {
    const { view } = this.state, { width, height } = this.scene;
    if (!this.cursor) this.cursor = { row: Math.floor(view.y), col: Math.floor(view.x) };
    else {
      const cell = this.cell(), end = (value, limit) => Math.min(limit - 1, Math.max(0, value));
      this.cursor.row = end(down > 0 ? cell.y + cell.h : down < 0 ? cell.y - 1 : cell.y, height);
      this.cursor.col = end(right === Infinity ? width - 1 : right > 0 ? cell.x + cell.w : right === -Infinity ? 0 : right < 0 ? cell.x - 1 : cell.x, width);
    }
    const { row, col } = this.cursor, follow = { ...view };
    if (row < view.y || row >= view.y + view.h) follow.y = row - view.h / 2;
    if (col < view.x || col >= view.x + view.w) follow.x = col - view.w / 2;
    if (follow.x !== view.x || follow.y !== view.y) this.look(follow);
    this.draw();
    this.tell(true);
  }

  enter() {
    if (this.state.row !== "" || !this.cursor) return;
    const { row, col } = this.cell();
    this.cursor = null;
    this.set({ row: String(row.layer), col: String(col.layer), view: null });
  }

  leave() {
    this.cursor = null;
    this.set({ row: "", col: "", view: null });
  }
}

document.addEventListener("DOMContentLoaded", () => {
  const shared = document.getElementById("colors");
  if (!shared || !("DecompressionStream" in window)) return; // the static pictures stay
  const colors = Object.fromEntries(Object.entries(JSON.parse(shared.textContent)).map(([name, hex]) => [name, palette(hex)]));
  for (const root of document.querySelectorAll(".explorer")) {
    const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    new Explorer(root, data, colors).start();
  }
});
