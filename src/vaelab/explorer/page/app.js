// The page: one state, drawn into panels, changed by what people do. The model is asked through `backend.js`.

import { connect } from "./backend.js";
import { between, latest, nearest, sum } from "./codes.js";
import { gif } from "./film.js";
import { LatentMap } from "./map.js";
import { Pad, border, read } from "./sketch.js";

const $ = (id) => document.getElementById(id);
const FEW = 16; // sliders that are shown at first
const LIMIT = 4; // standard deviations that a slider reaches
const FRAMES = 24; // from A to B
const GALLERY = 24;
const NAMES = ["A", "B", "C"];
const TELLING = 100; // test images: of fewer, one in a hundred says nothing

let world; // what `connect` gives
let map;
let pad;
const state = { z: null, base: "", changed: new Map(), start: 0, temperature: 1, slots: [null, null, null], way: "linear" };

// --- pictures -------------------------------------------------------------------------------------------------------

function paint(canvas, pixels) {
  const [channels, height, width] = world.info.shape, plane = height * width;
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = pixels[(channels === 3 ? c : 0) * plane + i];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function size() {
  return world.info.shape.reduce((product, side) => product * side, 1);
}

function code(row) {
  return world.codes.slice(row * world.info.latent, (row + 1) * world.info.latent);
}

function testImage(row) {
  return world.images.subarray(row * size(), (row + 1) * size());
}

function className(row) {
  const { classes, labels } = world.info;
  return labels ? (classes ? classes[labels[row]] : `${labels[row]}`) : null;
}

function named(row) {
  const name = className(row);
  return `test image ${row}${name === null ? "" : `, class ${name}`}`;
}

// A button that shows an image.
function thumb(label, pixels, press) {
  const button = document.createElement("button"), canvas = document.createElement("canvas");
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.title = label;
  button.append(canvas);
  paint(canvas, pixels);
  button.addEventListener("click", press);
  return button;
}

async function decode(codes) {
  const pixels = await world.model.decode(codes), each = size();
  return codes.map((_, i) => pixels.subarray(i * each, (i + 1) * each));
}

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

// What is started and fails says so, once, where everybody looks.
function guarded(task) {
  return async (...given) => {
    try {
      return await task(...given);
    } catch (error) {
      say(`This did not work: ${error.message}`, true);
    }
  };
}

// What is asked for later makes what is still on its way out of date.
const turns = { choice: 0, play: 0 };

const show = latest(guarded(async (z, caption) => {
  const [pixels] = await decode([z]);
  for (const id of ["picture", "preview"]) paint($(id), pixels); // the small one lies on the map where the screen is narrow
  $("picture-caption").textContent = caption;
  $("picture").setAttribute("aria-label", `The decoded image: ${caption}`);
  $("picture").dataset.count = `${Number($("picture").dataset.count ?? 0) + 1}`;
}));

// --- the state ------------------------------------------------------------------------------------------------------

// What is shown: where it came from, and what sliders have changed since.
function caption() {
  return [state.base, ...[...state.changed].map(([dimension, value]) => `z${dimension + 1} = ${value}`)].join(", ");
}

function choose(z, words) {
  stop();
  turns.choice++;
  state.z = Float32Array.from(z);
  state.base = words;
  state.changed.clear();
  show(state.z, words);
  map.put(placeOf(state.z));
  for (const input of document.querySelectorAll("#sliders input")) setSlider(input, state.z[input.dataset.dimension]);
  remember();
}

function start(row) {
  state.start = row;
  $("row").value = row;
  choose(code(row), `${named(row)}, as the model sees it`);
}

// Where a code lies on the map: on a plane through latent space, else where the closest code of an image lies.
function placeOf(z) {
  const { origin, directions } = world.info.map;
  if (!origin) {
    const row = nearest(world.codes, z);
    return [world.places[2 * row], world.places[2 * row + 1]];
  }
  return directions.map((direction) => direction.reduce((total, part, i) => total + part * (z[i] - origin[i]), 0));
}

function codeAt(x, y) {
  const { origin, directions } = world.info.map, row = map.nearestPoint(x, y);
  if (!origin) return [code(row), named(row)];
  const z = Float32Array.from(origin, (value, i) => value + x * directions[0][i] + y * directions[1][i]);
  return [z, `(${x.toFixed(2)}, ${y.toFixed(2)}) on the map, closest to ${named(row)}`];
}

const written = (z) => Array.from(z, (value) => Number(value.toFixed(3))).join(",");

function remember() {
  if (!state.z) return; // an address is still being read
  const link = new URLSearchParams({ z: written(state.z), start: state.start, t: state.temperature, way: state.way });
  state.slots.forEach((z, i) => { if (z) link.set(NAMES[i].toLowerCase(), written(z)); });
  clearTimeout(remember.timer); // browsers allow so many changes of the address a second, and no more
  remember.timer = setTimeout(() => history.replaceState(null, "", `#${link}`), 250);
}

// The state that an address holds; what does not fit this model is left out.
function recall() {
  const link = new URLSearchParams(location.hash.slice(1));
  const codeOf = (name) => {
    const text = link.get(name);
    if (!text) return null;
    const values = text.split(",").map(Number);
    const fits = values.length === world.info.latent && values.every((value) => Number.isFinite(value) && Math.abs(value) <= 1000);
    return fits ? Float32Array.from(values) : null;
  };
  const row = Number(link.get("start") ?? NaN), heat = Number(link.get("t") ?? NaN);
  if (Number.isInteger(row) && row >= 0 && row < world.info.count) state.start = row;
  else state.start = world.info.typical[0];
  setTemperature(heat >= 0 && heat <= 2 ? heat : 1);
  $("way").value = state.way = link.get("way") === "spherical" ? "spherical" : "linear";
  NAMES.forEach((name, i) => keep(i, codeOf(name.toLowerCase())));
  const z = codeOf("z");
  if (z) {
    $("row").value = state.start;
    choose(z, "from the link");
  } else start(state.start);
}

// --- panels ---------------------------------------------------------------------------------------------------------

function header() {
  const { info } = world, sides = info.shape.slice(1).join("×");
  document.title = `${info.title} · vaelab explorer`;
  $("title").textContent = info.title;
  $("subtitle").textContent = `${info.latent} latent dimension${info.latent > 1 ? "s" : ""}, `
    + `${info.shape[0] === 3 ? "colour" : "grey"} images of ${sides}, epoch ${info.epoch}, ${info.count.toLocaleString("en")} test images on the map`;
  $("footer").textContent = `vaelab ${info.vaelab}`;
}

function mapPanel() {
  const { info } = world;
  const how = {
    own: info.latent === 1
      ? "The one latent dimension from left to right; up and down means nothing."
      : "The two axes are the latent dimensions themselves: every point of the map is a code, and is decoded as it is.",
    pca: "A plane through latent space (principal components): a point stands for the code on that plane (inverse PCA), the other directions at their mean.",
    tsne: "t-SNE: neighbours stay neighbours, distances mean little. No point stands for a code, so the closest image's code is decoded.",
    umap: "UMAP: neighbours stay neighbours, distances mean little. No point stands for a code, so the closest image's code is decoded.",
  }[info.map.how];
  $("map-help").textContent = `${how} Move over it to decode, click to keep; drag to pan, wheel or pinch to zoom. Axes: ${info.map.axes.filter(Boolean).join(", ")}.`;
  map = new LatentMap($("map"), world.places, info.labels, info.colours, {
    over: (x, y) => { const [z, caption] = codeAt(x, y); show(z, caption); },
    away: () => { if (state.z) show(state.z, caption()); },
    pick: guarded(async (x, y, step) => {
      const [z, caption] = step && !info.map.origin ? besides(step) : codeAt(x, y);
      choose(z, caption);
      say(`Decoded ${caption}`);
    }),
  });
  for (const label of [...new Set(info.labels ?? [])].sort((a, b) => a - b)) {
    const item = document.createElement("li"), dot = document.createElement("i");
    dot.style.background = info.colours[label % info.colours.length];
    item.append(dot, info.classes ? info.classes[label] : `${label}`);
    $("legend").append(item);
  }
  $("zoom-in").addEventListener("click", () => map.zoom(1.5));
  $("zoom-out").addEventListener("click", () => map.zoom(1 / 1.5));
  $("zoom-all").addEventListener("click", () => map.all());
}

// With an arrow key on a map whose points stand for no code: the closest point in that direction.
function besides([dx, dy]) {
  const [x, y] = map.mark ?? [map.view.x, map.view.y];
  let best = -1, least = Infinity;
  for (let row = 0; row < world.info.count; row++) {
    const [across, up] = [world.places[2 * row] - x, world.places[2 * row + 1] - y];
    const along = across * dx + up * dy, aside = Math.abs(across * dy) + Math.abs(up * dx);
    if (along > 1e-6 && aside <= along && along + aside < least) [best, least] = [row, along + aside];
  }
  const row = best < 0 ? map.nearestPoint(x, y) : best;
  return [code(row), named(row)];
}

function setSlider(input, value) {
  const reach = Math.max(LIMIT, Math.ceil(Math.abs(value)));
  if (Number(input.max) < reach) [input.min, input.max] = [-reach, reach];
  input.value = value;
  input.nextElementSibling.textContent = Number(value).toFixed(2);
}

function sliderPanel() {
  const { order, rate } = world.info;
  $("sliders-help").textContent = rate
    ? "By the nats that each carries (its mean KL), the most telling first."
    : "By how much each moves from image to image, the most telling first.";
  order.forEach((dimension, place) => {
    const label = document.createElement("label"), name = document.createElement("span");
    const input = document.createElement("input"), value = document.createElement("span");
    value.setAttribute("aria-hidden", "true"); // a slider says its value itself
    label.className = "slider";
    label.hidden = place >= FEW;
    name.textContent = `z${dimension + 1} `;
    if (rate) name.append(Object.assign(document.createElement("small"), { textContent: `${rate[dimension].toFixed(2)} nats` }));
    Object.assign(input, { type: "range", min: -LIMIT, max: LIMIT, step: 0.01, value: 0 });
    input.dataset.dimension = dimension;
    input.addEventListener("input", () => {
      stop();
      turns.choice++;
      state.z[dimension] = Number(input.value);
      value.textContent = Number(input.value).toFixed(2);
      state.changed.set(dimension, value.textContent);
      show(state.z, caption());
      map.put(placeOf(state.z));
      remember();
    });
    label.append(name, input, value);
    $("sliders").append(label);
  });
  $("all-sliders").hidden = order.length <= FEW;
  $("all-sliders").textContent = `Show all ${order.length}`;
  $("all-sliders").addEventListener("click", () => {
    for (const label of $("sliders").children) label.hidden = false;
    $("all-sliders").hidden = true;
  });
}

function setTemperature(value) {
  state.temperature = value;
  $("temperature").value = value;
  $("temperature-value").textContent = value.toFixed(2);
}

// A draw from the prior, moved towards its mean or away from it by the temperature.
function drawn() {
  const { latent, draws } = world.info, row = Math.floor(Math.random() * draws);
  drawn.mean ??= Float32Array.from({ length: latent }, (_, i) => {
    let total = 0;
    for (let k = 0; k < draws; k++) total += world.prior[k * latent + i];
    return total / draws;
  });
  return Float32Array.from(drawn.mean, (mean, i) => mean + state.temperature * (world.prior[row * latent + i] - mean));
}

function picturePanel() {
  for (const row of world.info.typical) {
    const name = className(row);
    $("typical").append(thumb(name === null ? `test image ${row}` : `a typical ${name}`, testImage(row), () => start(row)));
  }
  $("reset").addEventListener("click", () => { start(state.start); say("Back to the image that was started from"); });
  $("randomise").addEventListener("click", () => choose(drawn(), `a draw from the prior at temperature ${state.temperature.toFixed(2)}`));
  $("temperature").addEventListener("input", () => { setTemperature(Number($("temperature").value)); remember(); });
  $("temperature").addEventListener("change", () => gallery());
  $("row").max = world.info.count - 1;
  $("row").addEventListener("change", () => {
    const row = Number($("row").value);
    if (Number.isInteger(row) && row >= 0 && row < world.info.count) start(row);
    else say(`There are test images 0 to ${world.info.count - 1}`, true);
  });
  $("any-row").addEventListener("click", () => start(Math.floor(Math.random() * world.info.count)));
  $("save-picture").addEventListener("click", () => $("picture").toBlob((blob) => save(blob, "vaelab.png")));
  $("link").addEventListener("click", guarded(async () => {
    settle();
    remember();
    await new Promise((done) => setTimeout(done, 300));
    await navigator.clipboard.writeText(location.href);
    say("The link to this state is copied");
  }));
}

function save(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// --- drawing --------------------------------------------------------------------------------------------------------

let given = null; // the image that is judged, before it is inverted

const judge = latest(guarded(async () => {
  if (!given) return;
  const image = given, choice = turns.choice, x = asTrainedOn($("invert").checked ? image.map((value) => 1 - value) : image);
  paint($("seen"), Uint8Array.from(x, (value) => Math.round(255 * value)));
  const found = await world.model.score(x);
  if (given !== image) return; // cleared, or drawn anew
  paint($("rebuilt"), found.mean);
  verdict(found.distortion === null || found.rate === null ? NaN : found.distortion + found.rate);
  if (turns.choice === choice && found.loc.every(Number.isFinite)) choose(found.loc, "your image, as the model sees it");
}));

// Where the model knows binary pixels alone, it is given such.
function asTrainedOn(x) {
  return world.info.binary ? x.map((value) => (value > 0.5 ? 1 : 0)) : x;
}

function verdict(total) {
  const { what, sorted } = world.info.score, count = sorted.length;
  if (!Number.isFinite(total)) {
    $("verdict").textContent = "The model has no finite score for this image. This is unusual.";
    $("verdict").classList.add("unusual");
    $("scale").hidden = true;
    return;
  }
  const share = sorted.filter((other) => other < total).length / count, enough = count >= TELLING;
  const unusual = enough && share >= 0.99, judged = unusual ? " This is unusual." : enough ? " This is not unusual." : "";
  $("verdict").textContent = `${total.toFixed(1)} (${what}): higher than ${(100 * share).toFixed(1)} % of ${count.toLocaleString("en")} test images.${judged}`;
  $("verdict").classList.toggle("unusual", unusual);
  $("scale").hidden = false;
  $("scale-mark").style.left = `${100 * share}%`;
  $("scale-help").textContent = enough
    ? `Unusual is what lies above 99 % of the test images (${sorted[Math.ceil(0.99 * count) - 1].toFixed(1)}).`
    : "There are too few test images to call one unusual.";
}

function take(x) {
  given = x;
  judge();
}

// Whether an image is dark at its border, as MNIST's are.
function dark(image) {
  return border(image, world.info.shape) < 0.5;
}

function darkData() {
  return dark(Float32Array.from(testImage(0), (value) => value / 255));
}

// The pad is light on dark: for data that are not, a drawing is inverted.
function fresh() {
  $("invert").checked = world.info.shape[0] === 1 && !darkData();
}

function drawPanel() {
  fresh();
  pad = new Pad($("pad"), world.info.shape, () => { if ($("file").value) fresh(); $("file").value = ""; take(pad.image()); });
  for (const name of ["seen", "rebuilt"]) paint($(name), new Uint8Array(size()));
  $("ink-label").hidden = world.info.shape[0] !== 3;
  $("ink").addEventListener("input", () => { pad.ink = $("ink").value; });
  $("clear").addEventListener("click", () => {
    pad.clear();
    fresh();
    given = null;
    for (const name of ["seen", "rebuilt"]) paint($(name), new Uint8Array(size()));
    $("verdict").textContent = $("scale-help").textContent = "";
    $("scale").hidden = true;
    $("file").value = "";
  });
  const load = guarded(async (file) => {
    if (!file) return;
    let x;
    try {
      x = await read(file, world.info.shape);
    } catch {
      throw new Error(`${file.name} is not an image that this browser can read`);
    }
    $("invert").checked = world.info.shape[0] === 1 && darkData() !== dark(x); // ink on paper, where the data are light on dark
    take(x);
    say(`${file.name}: scaled to ${world.info.shape.slice(1).join("×")}`);
  });
  $("file").addEventListener("change", () => load($("file").files[0]));
  $("invert").addEventListener("change", () => judge());
  for (const name of ["dragover", "dragleave", "drop"]) {
    $("draw-panel").addEventListener(name, (event) => {
      event.preventDefault();
      $("pad").classList.toggle("over", name === "dragover");
      if (name === "drop") load(event.dataTransfer.files[0]);
    });
  }
}

// --- between and beyond ---------------------------------------------------------------------------------------------

const keep = guarded(async (i, z) => {
  const kept = state.slots[i] = z && Float32Array.from(z);
  remember();
  ready();
  const [pixels] = kept ? await decode([kept]) : [new Uint8Array(size())];
  if (state.slots[i] === kept) paint($(`slot-${NAMES[i]}`), pixels);
});

function ready() {
  const [a, b, c] = state.slots;
  for (const id of ["play", "download", "position"]) $(id).disabled = !(a && b);
  $("sum").disabled = !(a && b && c);
}

function pathPanel() {
  NAMES.forEach((name, i) => {
    const slot = document.createElement("div"), canvas = document.createElement("canvas"), button = document.createElement("button");
    slot.className = "slot";
    canvas.id = `slot-${name}`;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `The code that is kept as ${name}`);
    Object.assign(button, { type: "button", id: `keep-${name}`, textContent: `Keep as ${name}` });
    button.addEventListener("click", async () => { settle(); await keep(i, state.z); say(`Kept as ${name}`); });
    slot.append(canvas, button);
    $("slots").append(slot);
    paint(canvas, new Uint8Array(size()));
  });
  ready();
  $("way").addEventListener("change", () => { state.way = $("way").value; remember(); });
  $("position").addEventListener("input", () => step(Number($("position").value)));
  $("play").addEventListener("click", guarded(play));
  $("download").addEventListener("click", guarded(async () => {
    const [channels, height, width] = world.info.shape, scale = Math.max(1, Math.round(168 / Math.max(height, width)));
    const there = await film();
    save(gif([...there, ...there.slice(1, -1).reverse()], [channels, height, width], scale, 60), "vaelab.gif");
    say("The GIF is made");
  }));
  $("sum").addEventListener("click", () => choose(sum(...state.slots), "A − B + C"));
}

function along(t) {
  return between(state.slots[0], state.slots[1], t, state.way);
}

function film() {
  return decode(Array.from({ length: FRAMES }, (_, i) => along(i / (FRAMES - 1))));
}

function step(t) {
  $("position").value = t;
  $("position-value").textContent = t.toFixed(2);
  choose(along(t), `${(100 * t).toFixed(0)} % of the way from A to B`);
}

// Ends the playing at the picture that is shown, and says whether there was any.
function settle() {
  if (!$("play").dataset.playing) return false;
  const isShown = $("play").dataset.playing === "true", where = Number($("position").value);
  stop();
  if (isShown) step(where);
  return true;
}

async function play() {
  if (settle()) return;
  const turn = ++turns.play;
  $("play").dataset.playing = "waiting";
  $("play").textContent = "Stop";
  let frames;
  try {
    frames = await film();
  } catch (error) {
    stop();
    throw error;
  }
  for (let tick = 0; turn === turns.play; tick++) {
    const phase = tick % (2 * FRAMES - 2), frame = phase < FRAMES ? phase : 2 * FRAMES - 2 - phase, t = frame / (FRAMES - 1);
    $("play").dataset.playing = "true";
    for (const id of ["picture", "preview"]) paint($(id), frames[frame]);
    $("picture-caption").textContent = `${Math.round(100 * t)} % of the way from A to B`;
    $("position").value = t;
    $("position-value").textContent = t.toFixed(2);
    await new Promise((done) => setTimeout(done, 60));
  }
}

// Whatever is chosen ends the playing.
function stop() {
  turns.play++;
  delete $("play").dataset.playing;
  $("play").textContent = "Play A → B";
}

const gallery = latest(guarded(async () => {
  const codes = Array.from({ length: GALLERY }, drawn), images = await decode(codes);
  $("gallery").replaceChildren(...codes.map((z, i) => thumb(`sample ${i + 1}`, images[i], () => {
    choose(z, `sample ${i + 1} at temperature ${state.temperature.toFixed(2)}`);
    $("picture-panel").scrollIntoView({ block: "nearest" });
  })));
}));

// --- all of it ------------------------------------------------------------------------------------------------------

async function main() {
  world = await connect();
  header();
  mapPanel();
  sliderPanel();
  picturePanel();
  drawPanel();
  pathPanel();
  $("more").addEventListener("click", () => gallery());
  recall();
  await gallery();
  addEventListener("hashchange", () => {
    if (!new URLSearchParams(location.hash.slice(1)).has("z")) return; // a place on the page, where the skip link leads
    recall();
    gallery();
  });
  say("Ready");
  document.documentElement.dataset.ready = "true";
}

main().catch((error) => {
  $("subtitle").textContent = "";
  say(`The explorer could not start: ${error.message}`, true);
});
