// Drawing pad and image files: from ink or a photograph to what the model was trained on.

const SIDE = 280; // of the pad
const BOX = 20 / 28; // of the shorter side: the box that a digit of MNIST was scaled to

export class Pad {
  // done(): called after each stroke
  constructor(canvas, [channels, height, width], done) {
    Object.assign(this, { canvas, channels, height, width, done });
    const scale = SIDE / Math.max(height, width);
    [canvas.width, canvas.height] = [Math.round(width * scale), Math.round(height * scale)];
    this.context = canvas.getContext("2d", { willReadFrequently: true });
    this.ink = "#ffffff";
    this.clear();
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.go(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => this.end());
  }

  clear() {
    this.context.fillStyle = "#000";
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    this.last = null;
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * this.canvas.width / box.width, (event.clientY - box.top) * this.canvas.height / box.height];
  }

  begin(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.last = this.at(event);
    this.stroke(this.last);
  }

  go(event) {
    if (this.last) this.stroke(this.at(event));
  }

  end() {
    if (!this.last) return;
    this.last = null;
    this.done();
  }

  stroke(to) {
    const context = this.context;
    context.strokeStyle = this.ink;
    context.lineWidth = Math.max(0.075 * Math.min(this.canvas.width, this.canvas.height), 2.2 * this.canvas.width / this.width);
    context.lineCap = context.lineJoin = "round";
    context.beginPath();
    context.moveTo(...this.last);
    context.lineTo(to[0] + 0.01, to[1]);
    context.stroke();
    this.last = to;
  }

  // What is drawn as pixels in [0, 1], C x H x W; null if nothing is. A grey drawing is scaled to MNIST's box and
  // centred by its mass, as MNIST's digits were.
  image() {
    const { data, width, height } = this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
    let [left, right, top, bottom] = [width, -1, height, -1];
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const at = 4 * (y * width + x);
        if (data[at] + data[at + 1] + data[at + 2] > 60) {
          left = Math.min(left, x); right = Math.max(right, x); top = Math.min(top, y); bottom = Math.max(bottom, y);
        }
      }
    }
    if (right < 0) return null;
    if (this.channels === 3) return shrink(this.canvas, 0, 0, width, height, this);
    const extent = Math.max(right - left, bottom - top) + 1, box = BOX * Math.min(this.width, this.height);
    const scale = box / extent;
    const small = document.createElement("canvas");
    [small.width, small.height] = [this.width, this.height];
    const place = (dx, dy) => {
      const context = small.getContext("2d", { willReadFrequently: true });
      context.fillStyle = "#000";
      context.fillRect(0, 0, small.width, small.height);
      context.imageSmoothingQuality = "high";
      context.drawImage(this.canvas, left, top, right - left + 1, bottom - top + 1,
        dx, dy, (right - left + 1) * scale, (bottom - top + 1) * scale);
      return pixels(context, this);
    };
    const first = place((this.width - (right - left + 1) * scale) / 2, (this.height - (bottom - top + 1) * scale) / 2);
    const [x, y] = centre(first, this.width);
    return place((this.width - (right - left + 1) * scale) / 2 + this.width / 2 - x,
                 (this.height - (bottom - top + 1) * scale) / 2 + this.height / 2 - y);
  }
}

// The centre of mass of a grey image, in pixels from its top left corner.
export function centre(x, width) {
  let [mass, across, down] = [0, 0, 0];
  x.forEach((value, i) => {
    mass += value;
    across += value * (i % width + 0.5);
    down += value * (Math.floor(i / width) + 0.5);
  });
  return [across / mass, down / mass];
}

// An image file, cut to the model's proportions and scaled to its size.
export async function read(file, shape) {
  const bitmap = await createImageBitmap(file);
  const [, height, width] = shape, share = Math.min(bitmap.width / width, bitmap.height / height);
  const [w, h] = [width * share, height * share];
  return shrink(bitmap, (bitmap.width - w) / 2, (bitmap.height - h) / 2, w, h, { channels: shape[0], height, width });
}

function shrink(source, left, top, width, height, size) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [size.width, size.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff"; // what is transparent in a file is paper
  context.fillRect(0, 0, size.width, size.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, left, top, width, height, 0, 0, size.width, size.height);
  return pixels(context, size);
}

function pixels(context, { channels, height, width }) {
  const { data } = context.getImageData(0, 0, width, height), plane = height * width;
  const x = new Float32Array(channels * plane);
  for (let i = 0; i < plane; i++) {
    const [red, green, blue] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
    if (channels === 3) [x[i], x[plane + i], x[2 * plane + i]] = [red / 255, green / 255, blue / 255];
    else x[i] = (0.299 * red + 0.587 * green + 0.114 * blue) / 255;
  }
  return x;
}

// The mean of the pixels along the border of an image in [0, 1].
export function border(x, [channels, height, width]) {
  let [total, count] = [0, 0];
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < height; y++) {
      for (let i = 0; i < width; i++) {
        if (y > 0 && y < height - 1 && i > 0 && i < width - 1) continue;
        total += x[(c * height + y) * width + i];
        count++;
      }
    }
  }
  return total / count;
}
