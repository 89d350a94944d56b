// Asks a server everything from Node with @grpc/grpc-js, and prints what came back as JSON.
//
// node calls.js TARGET IMAGE TENSOR PROTO: as the script beside tritonclient's, with the proto file read by @grpc/proto-loader; then
// a heatmap once more with nothing but the server's reflection. Modules come from build/clients/node.
"use strict";

const fs = require("node:fs");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");
const { GrpcReflection } = require("grpc-js-reflection-client");

const [target, image, tensor, proto] = process.argv.slice(2);
const MODEL = "surface";
const OPTIONS = { keepCase: true, longs: Number, enums: String, defaults: true, oneofs: true };

// A .npy file of float32: its header ends with the first newline.
function elements(path) {
  const file = fs.readFileSync(path);
  const start = file.indexOf("\n") + 1;
  const shape = /'shape': \(([^)]*)\)/.exec(file.toString("latin1", 0, start))[1];
  return { raw: file.subarray(start), shape: shape.split(",").filter((size) => size.trim()).map(Number) };
}

const row = elements(tensor);

function request(more) {
  const input = { name: "input", datatype: "FP32", shape: row.shape };
  return { model_name: MODEL, inputs: [input], raw_input_contents: [row.raw], ...more };
}

function requested(name, parameters) {
  const texts = Object.entries(parameters || {}).map(([key, value]) => [key, { string_param: value }]);
  return { name, parameters: Object.fromEntries(texts) };
}

const SEVERAL = [
  requested("probabilities"),
  requested("heatmap:0", { method: "grad-cam" }),
  requested("heatmap:1", { method: "layercam", layer: "layer2", target: "scratch" }),
];

// Raw contents as values; every text comes with its length in four bytes before it.
function values(datatype, raw) {
  const found = [];
  const sizes = { FP32: 4, FP64: 8, INT64: 8, INT32: 4 };
  const read = {
    FP32: (at) => raw.readFloatLE(at),
    FP64: (at) => raw.readDoubleLE(at),
    INT64: (at) => Number(raw.readBigInt64LE(at)),
    INT32: (at) => raw.readInt32LE(at),
  };
  for (let at = 0; at < raw.length; ) {
    if (datatype === "BYTES") {
      const length = raw.readUInt32LE(at);
      found.push(raw.toString("utf8", at + 4, at + 4 + length));
      at += 4 + length;
    } else {
      found.push(read[datatype](at));
      at += sizes[datatype];
    }
  }
  return found;
}

function plain(parameters) {
  return Object.fromEntries(Object.entries(parameters).map(([key, value]) => [key, value[value.parameter_choice]]));
}

function told(response) {
  const outputs = {};
  response.outputs.forEach(({ name, datatype, shape, parameters }, index) => {
    const read = values(datatype, response.raw_output_contents[index]);
    outputs[name] = { datatype, shape, values: read, parameters: plain(parameters) };
  });
  const { model_name: model, model_version: version, id, parameters } = response;
  return { model, version, id, parameters: plain(parameters), outputs };
}

const refused = (error) => ({ status: grpc.status[error.code], message: error.details });

function tensors(described) {
  return Object.fromEntries(described.map((one) => [one.name, [one.datatype, one.shape]]));
}

async function main() {
  const { inference } = grpc.loadPackageDefinition(loader.loadSync(proto, OPTIONS));
  const client = new inference.GRPCInferenceService(target, grpc.credentials.createInsecure());
  const call = (method, message) =>
    new Promise((resolve, reject) => {
      client[method](message, (error, answer) => (error ? reject(error) : resolve(answer)));
    });
  const infer = (more) => call("ModelInfer", request(more)).then(told, refused);
  const states = async () => {
    const { models } = await call("RepositoryIndex", {});
    return Object.fromEntries(models.map((one) => [`${one.name}/${one.version}`, one.state]));
  };

  const found = {
    live: (await call("ServerLive", {})).live,
    ready: (await call("ServerReady", {})).ready,
    "model ready": (await call("ModelReady", { name: MODEL })).ready,
    "unknown ready": (await call("ModelReady", { name: "nobody" })).ready,
    server: await call("ServerMetadata", {}),
  };
  const { name, versions, inputs, outputs } = await call("ModelMetadata", { name: MODEL });
  found.metadata = { name, versions, inputs: tensors(inputs), outputs: tensors(outputs) };
  found.predicted = await infer({ id: "part-4711" });
  found.image = await call("ModelInfer", {
    model_name: MODEL,
    inputs: [{ name: "image", datatype: "BYTES", shape: [1], contents: { bytes_contents: [fs.readFileSync(image)] } }],
    outputs: [requested("heatmap")],
  }).then(told, refused);
  found.one = await infer({ outputs: [requested("heatmap:layercam")] });
  found.several = await infer({ outputs: SEVERAL });
  found.defaults = await infer({
    outputs: [requested("heatmap")],
    parameters: requested("", {
      "explain.method": "layercam", "explain.layer": "layer2", "explain.target": "scratch",
    }).parameters,
  });
  found.refused = {
    model: await infer({ model_name: "nobody" }),
    version: await infer({ model_version: "7" }),
    input: await infer({ inputs: [], raw_input_contents: [] }),
    output: await infer({ outputs: [requested("no-such-output")] }),
    layer: await infer({ outputs: [requested("heatmap", { layer: "layer9" })] }),
    parameter: await infer({ outputs: [requested("heatmap", { colour: "red" })] }),
  };

  found.stream = await new Promise((resolve, reject) => {
    const answers = [];
    const stream = client.ModelStreamInfer();
    stream.on("data", ({ error_message: message, infer_response: response }) => {
      answers.push(message ? { message } : told(response));
    });
    stream.on("error", reject);
    stream.on("end", () => resolve(answers));
    stream.write(request({ id: "first", outputs: SEVERAL }));
    stream.write(request({ id: "lost", model_name: "nobody" }));
    stream.end();
  });

  found.repository = [await states()];
  await call("RepositoryModelUnload", { model_name: "spare" });
  found.repository.push(await states());
  await call("RepositoryModelLoad", { model_name: "spare" });
  found.repository.push(await states());
  client.close();

  const reflection = new GrpcReflection(target, grpc.credentials.createInsecure());
  found.services = await reflection.listServices();
  const described = await reflection.getDescriptorBySymbol("inference.GRPCInferenceService");
  const package_ = described.getPackageObject(OPTIONS).inference;
  const reflected = new package_.GRPCInferenceService(target, grpc.credentials.createInsecure());
  found.reflected = await new Promise((resolve) => {
    // Read from descriptors, maps are lists of entries to protobuf.js.
    const parameters = [{ key: "method", value: { string_param: "layercam" } }];
    reflected.ModelInfer(request({ outputs: [{ name: "heatmap", parameters }] }), (error, answer) => {
      resolve(error ? refused(error) : told(answer));
    });
  });
  reflected.close();
  return found;
}

main().then(
  (found) => {
    process.stdout.write(JSON.stringify(found), () => process.exit(0));
  },
  (error) => {
    console.error(error);
    process.exit(1);
  },
);
