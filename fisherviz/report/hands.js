"use strict";
// What hands do with an explorer: lists and buttons, keys, mouse, fingers, and the address bar.

const KEYS = {
  ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -Infinity], End: [0, Infinity],
};

function listen(explorer) {
  for (const [name, field] of Object.entries(explorer.fields)) {
    field.addEventListener("change", () => {
      const change = { [name]: field.value };
      if (name === "kind" && (field.value === "rms") !== explorer.matrices.single) { // of other sizes
        change.view = null;
        explorer.cursor = null;
      }
      if (name === "row" || name === "col") {
        const other = name === "row" ? "col" : "row";
        change.view = null;
        explorer.cursor = null;
        if (field.value === "") change[other] = "";
        else if (explorer.state[other] === "") change[other] = field.value;
      }
      explorer.set(change);
    });
  }
  for (const button of explorer.root.querySelectorAll("[data-do]")) {
    const act = { in: () => explorer.zoom(0.5), out: () => explorer.zoom(2), whole: () => explorer.leave(), reset: () => explorer.look({ x: 0, y: 0, w: Infinity, h: Infinity }) };
    button.addEventListener("click", () => act[button.dataset.do]());
  }
  explorer.stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { view } = explorer.state, move = KEYS[event.key];
    if (move && event.shiftKey) explorer.look({ ...view, x: view.x + (Math.sign(move[1]) * view.w) / 4, y: view.y + (Math.sign(move[0]) * view.h) / 4 });
    else if (move) explorer.step(move);
    else if (event.key === "+" || event.key === "=") explorer.zoom(0.5);
    else if (event.key === "-") explorer.zoom(2);
    else if (event.key === "0") explorer.look({ x: 0, y: 0, w: Infinity, h: Infinity });
    else if (event.key === "Enter") explorer.enter();
    else if (event.key === "Escape") explorer.leave();
    else return;
    event.preventDefault();
  });
  for (const canvas of explorer.canvases) follow(explorer, canvas);
  explorer.map.addEventListener("click", (event) => {
    const [x, y] = explorer.point(event, explorer.map), count = explorer.data.layers.length;
    const [row, col] = [y, x].map((part) => String(Math.min(count - 1, Math.floor(part * count))));
    explorer.cursor = null;
    explorer.set({ row, col, view: null });
  });
  addEventListener("hashchange", () => {
    if (new URLSearchParams(location.hash.slice(1)).get("section") === explorer.section) explorer.restore();
  });
}

function follow(explorer, canvas) {
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !explorer.stage.contains(document.activeElement)) return; // the page scrolls
    event.preventDefault();
    explorer.zoom(Math.exp(Math.sign(event.deltaY) * Math.min(0.4, Math.abs(event.deltaY) / 300)), explorer.point(event, canvas));
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    explorer.stage.focus({ preventScroll: true });
    explorer.pointers.set(event.pointerId, explorer.point(event, canvas));
    canvas.setPointerCapture(event.pointerId);
    explorer.aim(explorer.point(event, canvas));
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = explorer.point(event, canvas), before = explorer.pointers.get(event.pointerId), { view } = explorer.state;
    if (!before) return explorer.aim(now);
    const others = [...explorer.pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
    if (others.length) {
      const apart = (point) => Math.hypot(point[0] - others[0][0], point[1] - others[0][1]);
      explorer.zoom(apart(before) / Math.max(1e-3, apart(now)), [(now[0] + others[0][0]) / 2, (now[1] + others[0][1]) / 2]);
    } else explorer.look({ ...view, x: view.x - (now[0] - before[0]) * view.w, y: view.y - (now[1] - before[1]) * view.h });
    explorer.pointers.set(event.pointerId, now);
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => explorer.pointers.delete(event.pointerId));
  canvas.addEventListener("dblclick", () => explorer.enter());
}
