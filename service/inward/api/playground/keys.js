// What `inward annotate --apply` knows a pair by: 63 bits of BLAKE2b (RFC 7693) over its texts, as Python writes them as JSON.

const MASK = (1n << 64n) - 1n;
const START = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
const ORDER = [
  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
  [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4], [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
  [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13], [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
  [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11], [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
  [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5], [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];
const PLACES = [
  [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15], [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14],
];
const turn = (x, by) => ((x >> by) | (x << (64n - by))) & MASK;

function compress(state, block, counted, last) {
  const v = [...state, ...START];
  v[12] ^= BigInt(counted);
  if (last) v[14] ^= MASK;
  for (let round = 0; round < 12; round += 1) {
    const order = ORDER[round % 10];
    PLACES.forEach(([a, b, c, d], i) => {
      v[a] = (v[a] + v[b] + block[order[2 * i]]) & MASK;
      v[d] = turn(v[d] ^ v[a], 32n);
      v[c] = (v[c] + v[d]) & MASK;
      v[b] = turn(v[b] ^ v[c], 24n);
      v[a] = (v[a] + v[b] + block[order[2 * i + 1]]) & MASK;
      v[d] = turn(v[d] ^ v[a], 16n);
      v[c] = (v[c] + v[d]) & MASK;
      v[b] = turn(v[b] ^ v[c], 63n);
    });
  }
  state.forEach((x, i) => { state[i] = x ^ v[i] ^ v[i + 8]; });
}

// Eight bytes of digest.
function blake2b(bytes) {
  const size = 8;
  const state = [...START];
  state[0] ^= 0x01010000n ^ BigInt(size);
  const blocks = Math.max(1, Math.ceil(bytes.length / 128));
  const padded = new Uint8Array(blocks * 128);
  padded.set(bytes);
  const view = new DataView(padded.buffer);
  for (let n = 0; n < blocks; n += 1) {
    const block = Array.from({ length: 16 }, (_, i) => view.getBigUint64(n * 128 + i * 8, true));
    compress(state, block, Math.min(bytes.length, (n + 1) * 128), n === blocks - 1);
  }
  const digest = new DataView(new ArrayBuffer(size));
  digest.setBigUint64(0, state[0], true);
  return digest.getBigUint64(0); // read as big-endian
}

// As Python's json.dumps writes it, which escapes what is not ASCII.
const quoted = (text) => JSON.stringify(text).replace(/[\u007f-\uffff]/g, (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, "0")}`);
const turns = (messages) => `[${messages.map((one) =>
  `{${Object.keys(one).sort().map((name) => `${quoted(name)}: ${quoted(one[name])}`).join(", ")}}`).join(", ")}]`;

export function keyOf(prompt, chosen, rejected) {
  const asked = typeof prompt === "string" ? prompt : turns(prompt);
  const content = `[${[asked, chosen, rejected].map(quoted).join(", ")}]`;
  return (blake2b(new TextEncoder().encode(content)) >> 1n).toString(16).padStart(16, "0");
}
