// Arithmetic of codes: Float32Arrays of D numbers.

export function between(a, b, t, way) {
  const line = a.map((value, i) => (1 - t) * value + t * b[i]);
  if (way !== "spherical") return line;
  const dot = a.reduce((sum, value, i) => sum + value * b[i], 0);
  const cosine = dot / (Math.hypot(...a) * Math.hypot(...b) || 1);
  const omega = Math.acos(Math.min(1, Math.max(-1, cosine)));
  const sine = Math.sin(omega);
  if (!(sine > 1e-4)) return line; // one direction, or opposite ones: no great circle is the shortest
  const [ofA, ofB] = [Math.sin((1 - t) * omega) / sine, Math.sin(t * omega) / sine];
  return a.map((value, i) => ofA * value + ofB * b[i]);
}

export function sum(a, b, c) {
  return a.map((value, i) => value - b[i] + c[i]);
}

// The row of a table (N x D, flat) that is closest to a vector.
export function nearest(table, vector) {
  const size = vector.length;
  let best = 0, least = Infinity;
  for (let row = 0; row * size < table.length; row++) {
    let total = 0;
    for (let i = 0; i < size && total < least; i++) total += (table[row * size + i] - vector[i]) ** 2;
    if (total < least) [best, least] = [row, total];
  }
  return best;
}

// How many pictures are on their way, in the page itself: who looks at it from outside waits for none.
let busy = 0;
function count(change) {
  busy += change;
  document.documentElement.dataset.busy = busy;
}

// One task at a time, and of what is asked meanwhile only the last: an answer that is out of date helps nobody.
export function latest(task) {
  let running = false, waiting = null;
  return async (...given) => {
    waiting = given;
    if (running) return;
    running = true;
    count(1);
    try {
      while (waiting) {
        const now = waiting;
        waiting = null;
        await task(...now);
      }
    } finally {
      running = false;
      count(-1);
    }
  };
}
