// What the page asks of the model: of the server that it came from, or of ONNX graphs that run in this browser.

const MODE = document.documentElement.dataset.mode;

async function get(path, options) {
  const answer = await fetch(path, options);
  if (!answer.ok) {
    let reason = `${answer.status}`;
    try { reason = (await answer.json()).error ?? reason; } catch { /* no JSON: the number must do */ }
    throw new Error(`${path}: ${reason}`);
  }
  return answer;
}

function post(path, content) {
  return get(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(content) });
}

class Server {
  async decode(codes) {
    const answer = await post("api/decode", { z: codes.map((z) => Array.from(z)) });
    return new Uint8Array(await answer.arrayBuffer());
  }

  async score(x) {
    const found = await (await post("api/score", { x: [Array.from(x, (value) => Math.round(1e5 * value) / 1e5)] })).json();
    return {
      loc: Float32Array.from(found.loc[0], (value) => value ?? NaN), mean: Uint8Array.from(found.mean[0]),
      distortion: found.distortion[0], rate: found.rate[0],
    };
  }
}

class Browser {
  constructor(ort, decoder, scorer, info) {
    [this.ort, this.decoder, this.scorer, this.info] = [ort, decoder, scorer, info];
    this.queue = Promise.resolve(); // a session takes one question at a time
  }

  static async start(info) {
    const { runtime } = await (await get("runtime.json")).json();
    const script = await get(runtime.script.url, { integrity: runtime.script.integrity, mode: "cors" });
    const address = URL.createObjectURL(new Blob([await script.text()], { type: "text/javascript" }));
    const ort = await import(address);
    const wasm = await get(runtime.wasm.url, { integrity: runtime.wasm.integrity, mode: "cors" });
    ort.env.wasm.wasmBinary = await wasm.arrayBuffer();
    ort.env.wasm.numThreads = 1; // more need headers that static hosts do not send
    const open = async (name) => ort.InferenceSession.create(new Uint8Array(await (await get(name)).arrayBuffer()));
    return new Browser(ort, await open("decoder.onnx"), await open("scorer.onnx"), info);
  }

  run(session, name, data, dims) {
    const answer = this.queue.then(() => session.run({ [name]: new this.ort.Tensor("float32", data, dims) }));
    this.queue = answer.catch(() => {});
    return answer;
  }

  async decode(codes) {
    const size = this.info.latent, data = new Float32Array(codes.length * size);
    codes.forEach((z, i) => data.set(z, i * size));
    return bytes((await this.run(this.decoder, "z", data, [codes.length, size])).mean.data);
  }

  async score(x) {
    const found = await this.run(this.scorer, "x", Float32Array.from(x), [1, ...this.info.shape]);
    return {
      loc: Float32Array.from(found.loc.data), mean: bytes(found.mean.data),
      distortion: found.distortion.data[0], rate: found.rate.data[0],
    };
  }
}

function bytes(values) {
  return Uint8Array.from(values, (value) => Math.round(255 * Math.min(1, Math.max(0, value))));
}

// Everything that is known of the run, and the model behind it.
export async function connect() {
  const [info, points, images] = await Promise.all([
    get("run.json").then((answer) => answer.json()),
    get("points.bin").then((answer) => answer.arrayBuffer()),
    get("images.bin").then((answer) => answer.arrayBuffer()),
  ]);
  const { count, latent, draws } = info, numbers = new Float32Array(points);
  const places = numbers.subarray(0, 2 * count);
  const codes = numbers.subarray(2 * count, (2 + latent) * count);
  const prior = numbers.subarray((2 + latent) * count, (2 + latent) * count + latent * draws);
  const model = MODE === "static" ? await Browser.start(info) : new Server();
  return { info, places, codes, prior, images: new Uint8Array(images), model };
}
