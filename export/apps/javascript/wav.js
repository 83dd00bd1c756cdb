// The samples of a .wav file's bytes, Float32Array, one channel: 16-bit or float, 16 kHz as the models hear.
export function readWav(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const chunks = {};
  for (let at = 12; at + 8 <= file.byteLength; at += 8 + view.getUint32(at + 4, true) + (view.getUint32(at + 4, true) & 1)) {
    chunks[String.fromCharCode(...file.subarray(at, at + 4))] = { at: at + 8, bytes: view.getUint32(at + 4, true) };
  }
  const { "fmt ": format, data } = chunks;
  if (!format || !data) throw new Error("not a .wav file");
  const [kind, channels, rate, bits] = [
    view.getUint16(format.at, true),
    view.getUint16(format.at + 2, true),
    view.getUint32(format.at + 4, true),
    view.getUint16(format.at + 14, true),
  ];
  if (channels !== 1 || rate !== 16000 || ![16, 32].includes(bits) || (bits === 32) !== (kind === 3)) {
    throw new Error(`${channels} channels, ${rate} Hz, ${bits} bits: one channel of 16 kHz, 16-bit or float, is read`);
  }
  const bytes = Math.min(data.bytes, file.byteLength - data.at);
  return Float32Array.from({ length: (8 * bytes) / bits }, (_, place) =>
    bits === 16 ? view.getInt16(data.at + 2 * place, true) / 32768 : view.getFloat32(data.at + 4 * place, true),
  );
}
