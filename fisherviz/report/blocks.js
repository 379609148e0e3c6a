"use strict";
// The blocks of a matrix from what the page holds of them. The streams are those of results/blocks.py, its kinds too.
// A block has rows × cols cells of `factor` entries per side: the entry of largest magnitude and the mean of each cell,
// of the matrix and of its difference from the exact one; where the factor is 1 both are the entry.

const [ZERO, SAME, BASIS, OUTER, ENTRIES, GAPS, CELLS] = [0, 1, 2, 3, 4, 5, 6];

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

async function floats(text) {
  return new Float32Array(await inflate(text));
}

// Rounded numbers come as the upper two bytes of their float32: all first bytes, then all second ones.
async function rounded(text) {
  const planes = new Uint8Array(await inflate(text));
  const count = planes.length / 2;
  const whole = new Uint32Array(count);
  for (let k = 0; k < count; k++) whole[k] = ((planes[k] << 24) | (planes[count + k] << 16)) >>> 0;
  return new Float32Array(whole.buffer);
}

function transposed(values, rows, cols) {
  const out = new Float32Array(rows * cols);
  for (let a = 0; a < rows; a++) for (let b = 0; b < cols; b++) out[b * rows + a] = values[a * cols + b];
  return out;
}

function minus(a, b) {
  return a.map((value, k) => value - b[k]);
}

// G ⊗ A of (g × h) and (a × b) matrices.
function kronecker(G, A, [g, a], [h, b]) {
  const out = new Float32Array(g * a * h * b);
  for (let i = 0; i < g; i++) {
    for (let k = 0; k < a; k++) {
      for (let j = 0; j < h; j++) {
        const scale = G[i * h + j], start = (i * a + k) * h * b + j * b;
        for (let l = 0; l < b; l++) out[start + l] = scale * A[k * b + l];
      }
    }
  }
  return out;
}

// (Q ⊗ R) diag(S) (Q ⊗ R)ᵀ: per pair of units a diagonal between R and Rᵀ.
function ofBasis(Q, R, S, [g, a]) {
  const out = new Float32Array(g * a * g * a), middle = new Float64Array(a), left = new Float64Array(a * a);
  for (let i = 0; i < g; i++) {
    for (let j = 0; j <= i; j++) {
      middle.fill(0);
      for (let k = 0; k < g; k++) {
        const weight = Q[i * g + k] * Q[j * g + k];
        for (let l = 0; l < a; l++) middle[l] += weight * S[k * a + l];
      }
      for (let x = 0; x < a; x++) for (let l = 0; l < a; l++) left[x * a + l] = R[x * a + l] * middle[l];
      for (let x = 0; x < a; x++) {
        for (let y = 0; y <= x; y++) {
          let sum = 0;
          for (let l = 0; l < a; l++) sum += left[x * a + l] * R[y * a + l];
          for (const [p, q] of [[i, j], [j, i]]) {
            out[(p * a + x) * g * a + q * a + y] = out[(p * a + y) * g * a + q * a + x] = sum;
          }
        }
      }
    }
  }
  return out;
}

// Cells of factor × factor entries: [entry of largest magnitude, mean].
function cellsOf(values, rows, cols, factor) {
  const n = Math.ceil(rows / factor), m = Math.ceil(cols / factor);
  const largest = new Float32Array(n * m), sums = new Float64Array(n * m), counts = new Float64Array(n * m);
  for (let a = 0; a < rows; a++) {
    const base = Math.floor(a / factor) * m;
    for (let b = 0; b < cols; b++) {
      const value = values[a * cols + b], cell = base + Math.floor(b / factor);
      sums[cell] += value;
      counts[cell] += 1;
      if (Math.abs(value) > Math.abs(largest[cell])) largest[cell] = value;
    }
  }
  return [largest, Float32Array.from(sums, (sum, k) => sum / counts[k])];
}

// All blocks on and above the diagonal of one matrix, by "row,column"; `exact` holds those of the exact one, or null.
function unpack(layout, factors, entries, exact) {
  const found = new Map(), shapes = layout.shapes;
  let at = 0, place = 0;
  const take = (count) => factors.subarray(at, (at += count));
  const read = (n, m, diagonal) => {
    if (!diagonal) return entries.slice(place, (place += n * m));
    const out = new Float32Array(n * n);
    for (let a = 0; a < n; a++) for (let b = a; b < n; b++) out[a * n + b] = out[b * n + a] = entries[place++];
    return out;
  };
  for (let i = 0; i < shapes.length; i++) {
    for (let j = i; j < shapes.length; j++) {
      const [[g, a], [h, b]] = [shapes[i], shapes[j]], factor = i === j ? layout.within : layout.between;
      const rows = g * a, cols = h * b, n = Math.ceil(rows / factor), m = Math.ceil(cols / factor);
      const kind = take(1)[0], other = exact && exact.get(`${i},${j}`);
      const none = () => new Float32Array(n * m);
      let own = null;
      if (kind === OUTER) own = kronecker(take(g * h), take(a * b), shapes[i], shapes[j]);
      if (kind === BASIS) own = ofBasis(take(g * g), take(a * a), take(g * a), shapes[i]);
      if (kind === ZERO) own = new Float32Array(rows * cols);
      if (kind === ENTRIES) own = read(n, m, i === j);
      let largest, mean, gapLargest = null, gapMean = null;
      if (kind === SAME) {
        [largest, mean, gapLargest, gapMean] = [other.largest, other.mean, none(), none()];
      } else if (kind === GAPS) {
        gapLargest = gapMean = read(n, m, i === j);
        largest = mean = minus(other.mean, gapMean);
      } else if (kind === CELLS) {
        [largest, mean] = [read(n, m, i === j), read(n, m, i === j)];
        if (other) [gapMean, mean, gapLargest] = [mean, minus(other.mean, mean), read(n, m, i === j)];
      } else {
        [largest, mean] = factor === 1 ? [own, own] : cellsOf(own, rows, cols, factor);
        if (other) gapMean = minus(other.mean, mean);
        if (other) gapLargest = factor === 1 ? gapMean : kind === ZERO ? other.largest : read(n, m, i === j);
      }
      found.set(`${i},${j}`, { n, m, factor, largest, mean, gapLargest, gapMean });
    }
  }
  return found;
}

// Above the limit of dense matrices: one cell per block, the root mean square of its entries and of their differences.
function rootMeans(count, own, gap) {
  const found = new Map();
  for (let i = 0; i < count; i++) {
    for (let j = i; j < count; j++) {
      const at = i * count + j, value = own.subarray(at, at + 1), away = gap && gap.subarray(at, at + 1);
      found.set(`${i},${j}`, { n: 1, m: 1, factor: 1, largest: value, mean: value, gapLargest: away, gapMean: away });
    }
  }
  return found;
}

// The matrices of one section, unpacked when they are first asked for; `single`: those whose blocks are single cells.
class Matrices {
  constructor(data, single = false) {
    this.data = data;
    this.single = single;
    this.sizes = data.layers.map((layer) => (single ? 1 : layer.units * layer.inputs));
    this.offsets = this.sizes.reduce((ends, size) => [...ends, ends[ends.length - 1] + size], [0]);
    const shapes = data.layers.map((layer) => [layer.units, layer.inputs]);
    this.layout = single ? { within: 1, between: 1 } : { shapes, ...data.layout };
    this.held = new Map();
  }

  async of(kind, method) {
    const key = `${kind} ${method}`;
    if (!this.held.has(key)) this.held.set(key, this.unpacked(kind, method));
    return this.held.get(key);
  }

  async unpacked(kind, method) {
    const exact = method === "exact" ? null : await this.of(kind, "exact");
    const [first, second] = this.data.kinds[kind][method];
    if (this.single) {
      return rootMeans(this.sizes.length, await floats(first), second && (await floats(second)));
    }
    return unpack(this.layout, await floats(first), await rounded(second), exact);
  }

  // Positions in unit order of a layer's entries in another order.
  permutation(i, order) {
    const { units, inputs } = this.data.layers[i], size = this.sizes[i];
    if (order === "unit" || this.single) return Uint32Array.from({ length: size }, (_, k) => k);
    if (order === "input") return Uint32Array.from({ length: size }, (_, k) => (k % units) * inputs + Math.floor(k / units));
    return Uint32Array.from(this.torch.subarray(this.offsets[i], this.offsets[i + 1]));
  }

  async prepare() {
    if (this.data.torch) this.torch = await floats(this.data.torch);
    this.means = {};
    for (const [kind, text] of Object.entries(this.data.means)) this.means[kind] = await floats(text);
  }

  // What a parameter of a layer is: its place in unit order in words, in the layer that a sample was chosen from.
  parameter(i, k) {
    const layer = this.data.layers[i], { chosen_units: units, chosen_inputs: inputs } = layer;
    const [row, col] = [Math.floor(k / layer.inputs), k % layer.inputs];
    const unit = units ? units[row] : row, input = inputs ? inputs[col] : col, fanIn = inputs ? layer.fan_in : layer.inputs - 1;
    if (!layer.structured) return `entry ${input + 1}`;
    return `unit ${unit + 1}, ${layer.bias && input === fanIn ? "bias" : `weight of input ${input + 1}`}`;
  }
}
