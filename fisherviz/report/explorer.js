"use strict";
// The explorer of a section: exact, approximation and difference side by side, at one scale, with one view and one cursor.
// Written here rather than with Vega-Lite (0.8 MB), Observable Plot with d3 (0.5 MB) or Plotly (3.5 MB): what it takes is
// pixels from arrays and linked views of three canvases, which none of them does for a million entries.

const KEYS = {
  ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -Infinity], End: [0, Infinity],
};
const LEAST = 3; // entries that fill a panel at the closest zoom

class Explorer {
  constructor(root, data, colors) {
    this.root = root;
    this.section = root.dataset.section;
    this.data = data;
    this.colors = colors;
    this.matrices = new Matrices(data);
    this.canvases = [...root.querySelectorAll(".panel canvas")];
    this.stage = root.querySelector(".panels");
    this.map = root.querySelector(".map canvas");
    this.fields = Object.fromEntries([...root.querySelectorAll("[data-field]")].map((e) => [e.dataset.field, e]));
    this.said = root.querySelector("[role=status]");
    this.first = { method: data.methods[0], kind: Object.keys(data.kinds)[0], order: "unit", scale: "log", cell: "largest", row: "", col: "", view: null };
    this.state = { ...this.first };
    this.cursor = null;
    this.pointers = new Map();
    this.scales = new Map();
    this.turned = new Map();
    this.round = 0;
  }

  async start() {
    await this.matrices.prepare();
    this.listen();
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
    const { method, kind, order, scale, cell, row, col, view } = this.state, { rows, cols } = this.scene;
    const name = (i) => encodeURIComponent(this.data.layers[i].name);
    const block = row === "" ? "all" : `${name(row)}/${name(col)}`;
    const parts = { section: this.section, block, method, kind, order, scale, cell };
    const whole = view.w === this.scene.width && view.h === this.scene.height;
    if (!whole) parts.view = [view.x, view.y, view.w, view.h].map((v) => Number(v.toFixed(2))).join(",");
    history.replaceState(null, "", `#${new URLSearchParams(parts)}`);
    return [rows, cols];
  }

  async set(change, remember = true) {
    Object.assign(this.state, change);
    await this.show();
    if (remember) this.remember();
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
      step: (i) => (this.data.root_means || order === "torch" ? 0 : order === "unit" ? cut[i].inputs : cut[i].units),
      empty: 0,
    };
  }

  // The block of any two layers; below the diagonal it is the mirror of one above.
  block(blocks, i, j) {
    if (i <= j) return this.coarse(blocks.get(`${i},${j}`), i, j);
    const source = blocks.get(`${j},${i}`);
    if (!this.turned.has(source)) {
      const { n, m, factor } = source, flip = (values) => values && transposed(values, n, m);
      this.turned.set(source, {
        n: m, m: n, factor, largest: flip(source.largest), mean: flip(source.mean),
        gapLargest: flip(source.gapLargest), gapMean: flip(source.gapMean),
      });
    }
    return this.coarse(this.turned.get(source), i, j);
  }

  // Cells of several entries are known in unit order only: in any other order they are one cell.
  coarse(block, i, j) {
    if (block.factor === 1 || this.state.order === "unit") return block;
    const one = { n: 1, m: 1, factor: Math.max(this.matrices.sizes[i], this.matrices.sizes[j]) };
    for (const name of ["largest", "gapLargest"]) {
      one[name] = block[name] && [block[name].reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0)];
    }
    for (const name of ["mean", "gapMean"]) {
      one[name] = block[name] && [block[name].reduce((a, b) => a + b, 0) / block[name].length];
    }
    return one;
  }

  arrays() {
    const mean = this.state.cell === "mean";
    const own = (block) => (mean ? block.mean : block.largest), gap = (block) => (mean ? block.gapMean : block.gapLargest);
    return [own, own, gap];
  }

  scale() {
    const { kind, scale, cell, row, col, order } = this.state, key = [kind, cell, row, col, order].join(" ");
    const scene = { ...this.scene, block: (i, j) => this.block(this.held[0], i, j) };
    if (!this.scales.has(key)) this.scales.set(key, extent(scene, this.arrays()[0]));
    const { top, largest } = this.scales.get(key);
    return scaleOf(scale, top, largest);
  }

  draw() {
    if (!this.scene) return;
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

  // The layer × layer map: means of |entries|, logarithmic, with what the panels show framed.
  navigate() {
    const means = this.matrices.means[this.state.kind], count = this.data.layers.length, { row, col } = this.state;
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
    const { row, col, a, b, m, factor, y, x, h, w } = this.cell(), { root_means, layers } = this.data;
    const order = [this.scene.order(row.layer), this.scene.order(col.layer)];
    const at = factor === 1 ? order[0][a] * m + order[1][b] : a * m + b;
    const values = this.arrays().map((value, k) => value(this.block(this.held[k], row.layer, col.layer))[at]);
    const words = [[row, y, h, order[0]], [col, x, w, order[1]]].map(([piece, from, count, index]) => {
      const name = layers[piece.layer].name || "(root)", start = from - piece.start;
      if (root_means || (count > 1 && count === piece.end - piece.start)) return name;
      const first = this.matrices.parameter(piece.layer, index[start]);
      if (count === 1) return `${name}, ${first}`;
      return `${name}, ${first} to ${this.matrices.parameter(piece.layer, index[start + count - 1])}`;
    });
    const mean = this.state.cell === "mean";
    const what = root_means ? "Root mean square of the block’s entries"
      : factor === 1 ? "Entry" : `${mean ? "Mean" : "Largest"} of ${h} × ${w} entries`;
    return { values, words, what };
  }

  tell(aloud = false) {
    const table = this.root.querySelector(".reading"), names = ["what", "row", "col", "exact", "own", "gap"];
    const put = (name, text) => (table.querySelector(`[data-read=${name}]`).textContent = text);
    this.root.querySelectorAll("[data-name=method]").forEach((e) => (e.textContent = this.state.method));
    this.root.querySelector(".resolution").textContent = this.resolution();
    table.classList.toggle("empty", !this.cursor);
    if (!this.cursor) return names.forEach((name) => put(name, name === "what" ? "Point at a cell, or press an arrow key." : "–"));
    const { values, words, what } = this.reading();
    const texts = [what, ...words, ...values.map((value) => shown(value))];
    names.forEach((name, k) => put(name, texts[k]));
    Object.assign(table.dataset, { exact: values[0], own: values[1], gap: values[2] });
    if (aloud) {
      this.said.textContent = `${what}. Row ${words[0]}. Column ${words[1]}. Exact ${texts[3]}, ${this.state.method} ${texts[4]}, difference ${texts[5]}.`;
    }
  }

  resolution() {
    if (this.data.root_means) return "Each cell is the root mean square of a block’s entries, exact and never written out; layers are drawn equally wide.";
    const factors = new Set();
    for (const row of this.scene.rows) for (const col of this.scene.cols) factors.add(this.scene.block(row.layer, col.layer).factor);
    const { within, between } = this.data.layout, coarse = Math.max(...factors);
    if (coarse === 1) return "Every entry is here.";
    const which = within === 1 ? "Between layers" : "Here", unit = this.state.order === "unit";
    if (!unit) return `${which} the page holds cells in unit order only; in this order each block is one value.`;
    const also = within === 1 && factors.has(1) ? " Inside layers every entry is here." : "";
    return `${which} a cell covers ${between} × ${between} entries.${also}`;
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

  // ---- events ----

  listen() {
    for (const [name, field] of Object.entries(this.fields)) {
      field.addEventListener("change", () => {
        const change = { [name]: field.value };
        if (name === "row" || name === "col") {
          const other = name === "row" ? "col" : "row";
          change.view = null;
          this.cursor = null;
          if (field.value === "") change[other] = "";
          else if (this.state[other] === "") change[other] = field.value;
        }
        this.set(change);
      });
    }
    for (const button of this.root.querySelectorAll("[data-do]")) {
      const act = { in: () => this.zoom(0.5), out: () => this.zoom(2), whole: () => this.leave(), reset: () => this.look({ x: 0, y: 0, w: Infinity, h: Infinity }) };
      button.addEventListener("click", () => act[button.dataset.do]());
    }
    this.stage.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const { view } = this.state, move = KEYS[event.key];
      if (move && event.shiftKey) this.look({ ...view, x: view.x + (Math.sign(move[1]) * view.w) / 4, y: view.y + (Math.sign(move[0]) * view.h) / 4 });
      else if (move) this.step(move);
      else if (event.key === "+" || event.key === "=") this.zoom(0.5);
      else if (event.key === "-") this.zoom(2);
      else if (event.key === "0") this.look({ x: 0, y: 0, w: Infinity, h: Infinity });
      else if (event.key === "Enter") this.enter();
      else if (event.key === "Escape") this.leave();
      else return;
      event.preventDefault();
    });
    for (const canvas of this.canvases) this.follow(canvas);
    this.map.addEventListener("click", (event) => {
      const [x, y] = this.point(event, this.map), count = this.data.layers.length;
      const [row, col] = [y, x].map((part) => String(Math.min(count - 1, Math.floor(part * count))));
      this.cursor = null;
      this.set({ row, col, view: null });
    });
    addEventListener("hashchange", () => {
      if (new URLSearchParams(location.hash.slice(1)).get("section") === this.section) this.restore();
    });
  }

  follow(canvas) {
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !this.stage.contains(document.activeElement)) return; // the page scrolls
      event.preventDefault();
      this.zoom(Math.exp(Math.sign(event.deltaY) * Math.min(0.4, Math.abs(event.deltaY) / 300)), this.point(event, canvas));
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      this.stage.focus({ preventScroll: true });
      this.pointers.set(event.pointerId, this.point(event, canvas));
      canvas.setPointerCapture(event.pointerId);
      this.aim(this.point(event, canvas));
    });
    canvas.addEventListener("pointermove", (event) => {
      const now = this.point(event, canvas), before = this.pointers.get(event.pointerId), { view } = this.state;
      if (!before) return this.aim(now);
      const others = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
      if (others.length) {
        const apart = (point) => Math.hypot(point[0] - others[0][0], point[1] - others[0][1]);
        this.zoom(apart(before) / Math.max(1e-3, apart(now)), [(now[0] + others[0][0]) / 2, (now[1] + others[0][1]) / 2]);
      } else this.look({ ...view, x: view.x - (now[0] - before[0]) * view.w, y: view.y - (now[1] - before[1]) * view.h });
      this.pointers.set(event.pointerId, now);
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("dblclick", () => this.enter());
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
