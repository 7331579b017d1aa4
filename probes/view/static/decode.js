// Decoding of the numbers that the page carries: base64, gzip, and 8 bits a value with a scale for each row.

/** Return the bytes of a base64 text. */
function bytesOf(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i += 1) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** Return the bytes of a gzip stream in base64. */
async function gunzip(text) {
  const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Return little-endian float32 numbers in base64. */
function floatsOf(text) {
  const view = new DataView(bytesOf(text).buffer);
  return Float32Array.from({ length: view.byteLength / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

/** Return little-endian uint16 numbers from bytes. */
function shortsOf(bytes) {
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: view.byteLength / 2 }, (_, i) => view.getUint16(2 * i, true));
}

async function decodeMap(map) {
  const packed = await gunzip(map.values);
  if (map.kind === "words") return { ...map, values: shortsOf(packed) };
  return { ...map, values: packed, scale: floatsOf(map.scale) };
}

/** Return a run with its maps and masses as numbers. */
export async function decodeRun(run) {
  const maps = await Promise.all(run.maps.map(decodeMap));
  return { ...run, maps, mass: { values: floatsOf(run.mass.values), uniform: floatsOf(run.mass.uniform) } };
}
