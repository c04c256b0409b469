// The latent map: points to look at, zoom, pan, and a place that is decoded. It knows nothing of the model.

import { nearest } from "./codes.js";

const STEP = 14; // pixels that an arrow key moves the cursor by
const DRAG = 5; // pixels of movement that make a press a drag

export class LatentMap {
  // on: {over(x, y): the pointer rests there; away(): it has left; pick(x, y): it was chosen there}
  constructor(canvas, places, labels, colours, on) {
    Object.assign(this, { canvas, places, labels, colours, on });
    this.pointers = new Map();
    this.mark = null; // where the chosen code lies
    this.extent();
    new ResizeObserver(() => this.resize()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    for (const name of ["pointerdown", "pointermove", "pointerup", "pointercancel", "pointerleave"]) {
      canvas.addEventListener(name, (event) => this[name](event));
    }
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.keydown(event));
  }

  // --- where things are

  extent() {
    let [left, right, low, high] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < this.places.length; i += 2) {
      left = Math.min(left, this.places[i]); right = Math.max(right, this.places[i]);
      low = Math.min(low, this.places[i + 1]); high = Math.max(high, this.places[i + 1]);
    }
    this.whole = { x: (left + right) / 2, y: (low + high) / 2, span: 1.1 * Math.max(right - left, high - low, 1e-3) };
    this.view = { ...this.whole };
  }

  resize() {
    const density = window.devicePixelRatio || 1, side = Math.max(1, Math.round(this.canvas.clientWidth * density));
    if (this.canvas.width !== side) [this.canvas.width, this.canvas.height] = [side, side];
    this.draw();
  }

  // From the plane to pixels of the canvas, and back from those of the page.
  toPixel(x, y) {
    const scale = this.canvas.width / this.view.span, middle = this.canvas.width / 2;
    return [middle + (x - this.view.x) * scale, middle - (y - this.view.y) * scale];
  }

  toPlane(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect(), unit = this.view.span / box.width;
    return [this.view.x + (clientX - box.left - box.width / 2) * unit,
            this.view.y - (clientY - box.top - box.height / 2) * unit];
  }

  nearestPoint(x, y) {
    return nearest(this.places, [x, y]);
  }

  // --- what it looks like

  draw() {
    if (this.planned) return;
    this.planned = requestAnimationFrame(() => { this.planned = null; this.paint(); });
  }

  paint() {
    const context = this.canvas.getContext("2d"), side = this.canvas.width, density = window.devicePixelRatio || 1;
    const style = getComputedStyle(document.documentElement);
    context.clearRect(0, 0, side, side);
    this.axes(context, side, style.getPropertyValue("--line"));
    const zoom = Math.min(2.5, Math.sqrt(this.whole.span / this.view.span));
    const radius = 2 * density * zoom;
    context.globalAlpha = 0.75;
    for (let i = 0; i < this.places.length / 2; i++) {
      const [x, y] = this.toPixel(this.places[2 * i], this.places[2 * i + 1]);
      if (x < -radius || y < -radius || x > side + radius || y > side + radius) continue;
      context.fillStyle = this.colours[(this.labels ? this.labels[i] : 0) % this.colours.length];
      context.beginPath();
      context.arc(x, y, radius, 0, 2 * Math.PI);
      context.fill();
    }
    context.globalAlpha = 1;
    if (this.mark) this.cross(context, ...this.toPixel(...this.mark), density, style);
  }

  axes(context, side, colour) {
    const [x, y] = this.toPixel(0, 0);
    context.strokeStyle = colour;
    context.beginPath();
    context.moveTo(x, 0); context.lineTo(x, side);
    context.moveTo(0, y); context.lineTo(side, y);
    context.stroke();
  }

  cross(context, x, y, density, style) {
    for (const [colour, width] of [["--panel", 5], ["--ink", 2.2]]) {
      context.strokeStyle = style.getPropertyValue(colour);
      context.lineWidth = width * density;
      context.beginPath();
      context.arc(x, y, 8 * density, 0, 2 * Math.PI);
      context.moveTo(x - 13 * density, y); context.lineTo(x + 13 * density, y);
      context.moveTo(x, y - 13 * density); context.lineTo(x, y + 13 * density);
      context.stroke();
    }
    context.lineWidth = 1;
  }

  put(place) {
    this.mark = place;
    this.draw();
  }

  // --- what is done to it

  zoom(factor, at = [this.view.x, this.view.y]) {
    const span = Math.min(4 * this.whole.span, Math.max(1e-3 * this.whole.span, this.view.span / factor));
    const share = span / this.view.span;
    this.view = { x: at[0] + (this.view.x - at[0]) * share, y: at[1] + (this.view.y - at[1]) * share, span };
    this.draw();
  }

  all() {
    this.view = { ...this.whole };
    this.draw();
  }

  pan(from, to) {
    this.view.x += from[0] - to[0];
    this.view.y += from[1] - to[1];
    this.draw();
  }

  wheel(event) {
    event.preventDefault();
    this.zoom(Math.exp(-event.deltaY * (event.deltaMode === 1 ? 0.05 : 0.0015)), this.toPlane(event.clientX, event.clientY));
  }

  pointerdown(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY, startX: event.clientX, startY: event.clientY });
    this.dragged = this.pointers.size > 1;
    if (event.pointerType !== "mouse" && !this.dragged) this.on.over(...this.toPlane(event.clientX, event.clientY));
  }

  pointermove(event) {
    const pressed = this.pointers.get(event.pointerId);
    if (!pressed) { // a mouse that hovers
      this.on.over(...this.toPlane(event.clientX, event.clientY));
      return;
    }
    const others = [...this.pointers.values()].filter((other) => other !== pressed);
    const before = this.toPlane(pressed.x, pressed.y), after = this.toPlane(event.clientX, event.clientY);
    if (others.length) {
      const [other] = others, gap = (x, y) => Math.hypot(x - other.x, y - other.y) || 1;
      const factor = gap(event.clientX, event.clientY) / gap(pressed.x, pressed.y);
      [pressed.x, pressed.y] = [event.clientX, event.clientY];
      this.pan(before.map((value) => value / 2), after.map((value) => value / 2));
      this.zoom(factor, this.toPlane((event.clientX + other.x) / 2, (event.clientY + other.y) / 2));
      return;
    }
    if (Math.hypot(event.clientX - pressed.startX, event.clientY - pressed.startY) > DRAG) this.dragged ||= event.pointerType === "mouse";
    [pressed.x, pressed.y] = [event.clientX, event.clientY];
    if (event.pointerType === "mouse") { if (this.dragged) this.pan(before, after); }
    else if (!this.dragged) this.on.over(...after);
  }

  pointerup(event) {
    if (this.pointers.delete(event.pointerId) && !this.dragged) this.on.pick(...this.toPlane(event.clientX, event.clientY));
  }

  pointercancel(event) {
    this.pointers.delete(event.pointerId);
    this.on.away();
  }

  pointerleave(event) {
    if (!this.pointers.has(event.pointerId)) this.on.away();
  }

  keydown(event) {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
    const zooms = { "+": 1.3, "=": 1.3, "-": 1 / 1.3 };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (moves[event.key]) {
      const unit = (event.shiftKey ? 4 : 1) * STEP * this.view.span / this.canvas.clientWidth;
      const from = this.mark ?? [this.view.x, this.view.y], [dx, dy] = moves[event.key];
      const to = [from[0] + dx * unit, from[1] + dy * unit];
      const half = this.view.span / 2;
      if (Math.abs(to[0] - this.view.x) > half || Math.abs(to[1] - this.view.y) > half) this.pan(to, from);
      this.on.pick(...to, [dx, dy]);
    } else if (zooms[event.key]) this.zoom(zooms[event.key], this.mark ?? undefined);
    else if (event.key === "0") this.all();
    else return;
    event.preventDefault();
  }
}
