// A GIF (89a) of frames, each an array of bytes of C x H x W pixels, enlarged; it loops forever.

export function gif(frames, [channels, height, width], scale, delay) {
  const palette = channels === 1 ? greys() : cube();
  const out = [];
  const short = (value) => out.push(value & 255, value >> 8);
  out.push(...[..."GIF89a"].map((letter) => letter.charCodeAt(0)));
  short(width * scale);
  short(height * scale);
  out.push(0xf7, 0, 0, ...palette); // a table of 256 colours for all frames
  out.push(0x21, 0xff, 11, ...[..."NETSCAPE2.0"].map((letter) => letter.charCodeAt(0)), 3, 1, 0, 0, 0);
  for (const frame of frames) {
    out.push(0x21, 0xf9, 4, 0);
    short(Math.round(delay / 10));
    out.push(0, 0, 0x2c);
    short(0); short(0); short(width * scale); short(height * scale);
    out.push(0, 8);
    const data = compress(indices(frame, channels, height, width, scale));
    for (let at = 0; at < data.length; at += 255) {
      const block = data.slice(at, at + 255);
      out.push(block.length, ...block);
    }
    out.push(0);
  }
  out.push(0x3b);
  return new Blob([Uint8Array.from(out)], { type: "image/gif" });
}

function greys() {
  return Array.from({ length: 256 }, (_, i) => [i, i, i]).flat();
}

// Six levels of each colour; the rest of the table stays black.
function cube() {
  const table = [];
  for (let i = 0; i < 216; i++) table.push(51 * Math.floor(i / 36), 51 * (Math.floor(i / 6) % 6), 51 * (i % 6));
  return [...table, ...Array(3 * 40).fill(0)];
}

function indices(frame, channels, height, width, scale) {
  const plane = height * width, large = new Uint8Array(plane * scale * scale);
  for (let y = 0, at = 0; y < height * scale; y++) {
    for (let x = 0; x < width * scale; x++, at++) {
      const pixel = Math.floor(y / scale) * width + Math.floor(x / scale);
      if (channels === 1) large[at] = frame[pixel];
      else {
        const level = (channel) => Math.round(frame[channel * plane + pixel] / 51);
        large[at] = 36 * level(0) + 6 * level(1) + level(2);
      }
    }
  }
  return large;
}

// Lempel-Ziv-Welch with codes of 9 to 12 bits, as GIF has it.
function compress(values) {
  const clear = 256, end = 257, out = [];
  let bits = 0, held = 0, size = 9, next = 258, table = new Map();
  const write = (code) => {
    bits |= code << held;
    held += size;
    for (; held >= 8; held -= 8, bits >>>= 8) out.push(bits & 255);
  };
  write(clear);
  let prefix = values[0];
  for (let i = 1; i < values.length; i++) {
    const key = prefix * 256 + values[i], known = table.get(key);
    if (known !== undefined) { prefix = known; continue; }
    write(prefix);
    if (next < 4096) {
      table.set(key, next);
      if (next === 1 << size && size < 12) size++;
      next++;
    } else {
      write(clear);
      [size, next, table] = [9, 258, new Map()];
    }
    prefix = values[i];
  }
  write(prefix);
  if (next === 1 << size && size < 12) size++;
  write(end);
  if (held > 0) out.push(bits & 255);
  return out;
}
