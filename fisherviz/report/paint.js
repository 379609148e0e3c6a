"use strict";
// From blocks to pixels: which cell lies under a pixel, how several of them become one, and which colour a value has.

function palette(hex) {
  const out = new Uint32Array(hex.length / 6);
  for (let k = 0; k < out.length; k++) {
    const value = parseInt(hex.slice(6 * k, 6 * k + 6), 16);
    out[k] = ((255 << 24) | ((value & 255) << 16) | (value & 0xff00) | (value >> 16)) >>> 0;
  }
  return out;
}

const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

function power(exponent) {
  return "10" + [...String(exponent)].map((character) => RAISED[character]).join("");
}

function shown(value, digits = 3) {
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size >= 1e-3 && size < 1e5) return Number(value.toPrecision(digits)).toString().replace("-", "−");
  const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
  return `${mantissa.replace("-", "−")}·${power(Number(exponent))}`;
}

const DECADES = 5;

// A scale maps a value to a place between 0 and 1 in a palette, and has numbers at even distances for its legend.
function scaleOf(name, top, largest) {
  const high = 10 ** Math.ceil(Math.log10(largest || 1) - 1e-9), end = Math.log10(high);
  const depth = (size) => Math.min(1, Math.max(0, (Math.log10(size) - end) / DECADES + 1));
  const above = largest > top * 1.0001 ? "≥ " : "";
  if (name === "linear") {
    return { place: (v) => Math.min(1, Math.abs(v) / top), numbers: [0, 0.25, 0.5, 0.75, 1].map((s) => (s === 1 ? above : "") + shown(s * top, 2)) };
  }
  if (name === "signed") {
    const half = (v) => Math.min(1, Math.max(0, 0.5 + v / top / 2));
    const below = above ? "≤ " : "";
    return { signed: true, place: half, numbers: [-1, -0.5, 0, 0.5, 1].map((s) => (s === 1 ? above : s === -1 ? below : "") + shown(s * top, 2)) };
  }
  const tens = Array.from({ length: DECADES + 1 }, (_, k) => Math.round(end) - DECADES + k);
  if (name === "signed-log") {
    const upper = tens.map(power);
    upper[0] = "0";
    return {
      signed: true, place: (v) => (v === 0 ? 0.5 : 0.5 + (Math.sign(v) * depth(Math.abs(v))) / 2),
      numbers: [...tens.slice(1).reverse().map((k) => `−${power(k)}`), ...upper].filter((_, k) => k % 2 === 1 || DECADES % 2 === 0),
    };
  }
  return { place: (v) => (v === 0 ? 0 : depth(Math.abs(v))), numbers: tens.map((k, index) => (index ? "" : "≤ ") + power(k)) };
}

// Cells [from, to) of `count` per pixel, for pixels [start, stop) of an axis that shows [low, low + span) on `pixels`.
function ranges(start, stop, low, span, pixels, begin, factor, count) {
  const from = new Int32Array(stop - start), to = new Int32Array(stop - start);
  for (let p = start; p < stop; p++) {
    const a = low + (p * span) / pixels - begin, b = low + ((p + 1) * span) / pixels - begin;
    const first = Math.min(count - 1, Math.max(0, Math.floor(a / factor + 1e-9)));
    from[p - start] = first;
    to[p - start] = Math.min(count, Math.max(first + 1, Math.floor(b / factor + 1e-9)));
  }
  return [from, to];
}

// Draw one matrix into an image. `scene` says what is shown, `value` picks the array of a block.
function paint(image, scene, view, scale, colors, value, mean) {
  const { width, height } = image, pixels = new Uint32Array(image.data.buffer), last = colors.length - 1;
  for (const row of scene.rows) {
    const top = Math.max(0, Math.ceil(((row.start - view.y) / view.h) * height - 0.5));
    const bottom = Math.min(height, Math.ceil(((row.end - view.y) / view.h) * height - 0.5));
    if (top >= bottom) continue;
    for (const col of scene.cols) {
      const left = Math.max(0, Math.ceil(((col.start - view.x) / view.w) * width - 0.5));
      const right = Math.min(width, Math.ceil(((col.end - view.x) / view.w) * width - 0.5));
      if (left >= right) continue;
      const block = scene.block(row.layer, col.layer), values = value(block);
      const [fromRow, toRow] = ranges(top, bottom, view.y, view.h, height, row.start, block.factor, block.n);
      const [fromCol, toCol] = ranges(left, right, view.x, view.w, width, col.start, block.factor, block.m);
      const ordered = block.factor === 1, down = scene.order(row.layer), across = scene.order(col.layer);
      const again = (from, to, k) => k > 0 && from[k] === from[k - 1] && to[k] === to[k - 1]; // the same cells as one pixel before
      for (let y = top; y < bottom; y++) {
        if (again(fromRow, toRow, y - top)) {
          pixels.copyWithin(y * width + left, (y - 1) * width + left, (y - 1) * width + right);
          continue;
        }
        for (let x = left; x < right; x++) {
          if (again(fromCol, toCol, x - left)) {
            pixels[y * width + x] = pixels[y * width + x - 1];
            continue;
          }
          let best = 0, sum = 0, count = 0;
          for (let a = fromRow[y - top]; a < toRow[y - top]; a++) {
            const base = (ordered ? down[a] : a) * block.m;
            for (let b = fromCol[x - left]; b < toCol[x - left]; b++) {
              const found = values[base + (ordered ? across[b] : b)];
              if (mean) {
                sum += found;
                count += 1;
              } else if (!(Math.abs(found) <= Math.abs(best))) best = found; // so that NaN stays
            }
          }
          const seen = mean ? sum / count : best;
          pixels[y * width + x] = Number.isNaN(seen) ? 0 : colors[Math.round(scale.place(seen) * last)];
        }
      }
    }
  }
}

// The largest |value| of a scene, and the one below which 99.5 % of those that are not zero lie.
function extent(scene, value) {
  let largest = 0;
  const sample = [];
  for (const row of scene.rows) {
    for (const col of scene.cols) {
      const values = value(scene.block(row.layer, col.layer)), step = Math.max(1, Math.floor(values.length / 20000));
      for (let k = 0; k < values.length; k++) {
        const size = Math.abs(values[k]);
        if (size > largest) largest = size;
        if (k % step === 0 && size > 0) sample.push([size, values.length / 20000 > 1 ? step : 1]);
      }
    }
  }
  if (!sample.length) return { top: largest || 1, largest: largest || 1 };
  sample.sort((a, b) => a[0] - b[0]);
  let left = 0.005 * sample.reduce((sum, [, weight]) => sum + weight, 0), k = sample.length - 1;
  for (; k > 0 && left > sample[k][1]; k--) left -= sample[k][1];
  return { top: sample[k][0], largest };
}

// Boundaries of layers, and of units where they have room.
function rule(context, scene, view, ink) {
  const { width, height } = context.canvas;
  context.strokeStyle = ink;
  for (const [axis, low, span, size] of [["rows", view.y, view.h, height], ["cols", view.x, view.w, width]]) {
    for (const piece of scene[axis]) {
      const unit = scene.step(piece.layer), room = ((piece.end - piece.start) / span) * size;
      const lines = room > 14 ? [[piece.start, 0.9]] : [];
      if (unit > 1 && (unit / span) * size > 24) {
        for (let at = piece.start + unit; at < piece.end; at += unit) lines.push([at, 0.28]);
      }
      for (const [at, alpha] of lines) {
        const place = Math.round(((at - low) / span) * size) + 0.5;
        if (at <= 0 || place <= 0 || place >= size) continue;
        context.globalAlpha = alpha;
        context.setLineDash(alpha > 0.5 ? [5, 4] : []);
        context.beginPath();
        if (axis === "rows") context.moveTo(0, place), context.lineTo(width, place);
        else context.moveTo(place, 0), context.lineTo(place, height);
        context.stroke();
      }
    }
  }
  context.globalAlpha = 1;
  context.setLineDash([]);
}

// Layers' names in their own blocks, where these have room.
function label(context, scene, view, names) {
  const { width, height } = context.canvas, size = Math.round(Math.max(11, width / 32));
  context.save();
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.lineJoin = "round";
  for (const row of scene.rows) {
    for (const col of scene.cols.filter(({ layer }) => layer === row.layer)) {
      const x = Math.max(0, ((col.start - view.x) / view.w) * width), y = Math.max(0, ((row.start - view.y) / view.h) * height);
      const right = Math.min(width, ((col.end - view.x) / view.w) * width), name = names[row.layer];
      if (right - x < context.measureText(name).width + 10 || y > height - size) continue;
      context.lineWidth = 4;
      context.strokeStyle = "rgb(0 0 0 / .65)";
      context.strokeText(name, x + 5, y + size + 3);
      context.fillStyle = "#ffffff";
      context.fillText(name, x + 5, y + size + 3);
    }
  }
  context.restore();
}

function mark(context, view, cell, ink, paper) {
  const { width, height } = context.canvas;
  const x = ((cell.x - view.x) / view.w) * width, y = ((cell.y - view.y) / view.h) * height;
  const w = Math.max(3, (cell.w / view.w) * width), h = Math.max(3, (cell.h / view.h) * height);
  for (const [color, line] of [[paper, 5], [ink, 2]]) {
    context.strokeStyle = color;
    context.lineWidth = line;
    context.globalAlpha = color === paper ? 0.7 : 1;
    context.strokeRect(x - 1.5, y - 1.5, w + 3, h + 3);
  }
  context.globalAlpha = 0.55;
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(0, y + h / 2), context.lineTo(x - 6, y + h / 2);
  context.moveTo(x + w + 6, y + h / 2), context.lineTo(width, y + h / 2);
  context.moveTo(x + w / 2, 0), context.lineTo(x + w / 2, y - 6);
  context.moveTo(x + w / 2, y + h + 6), context.lineTo(x + w / 2, height);
  context.stroke();
  context.globalAlpha = 1;
}
