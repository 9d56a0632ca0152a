// The latents: typed arrays out of one compressed block, and what is read off them.
"use strict";

const NONE = 0xffffffff;

async function unpack(base64, layout) {
  const raw = atob(base64), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const types = { u8: Uint8Array, i8: Int8Array, u16: Uint16Array, i16: Int16Array, u32: Uint32Array, i32: Int32Array, f32: Float32Array };
  return Object.fromEntries(layout.map(({ name, type, offset, length }) => [name, new types[type](buffer, offset, length)]));
}

// Control and direction characters would be invisible, or reorder the text around them: shown as what they are.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;
function visible(text) {
  return text.replace(HIDDEN, (c) => {
    const code = c.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return code === 0x7f ? "\u2421" : `\u27e8U+${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
}

class Latents {
  constructor(arrays, meta) {
    Object.assign(this, arrays);
    this.meta = meta;
    this.vocabulary = meta.vocabulary;
    this.count = meta.d_sae;
    this.examples = meta.n_top + meta.n_intervals;
    this.level = new Uint8Array(this.count);
    meta.widths.forEach((width, l) => this.level.fill(l, l ? meta.widths[l - 1] : 0, width));
    this.childStart = new Uint32Array(this.count + 1);
    for (const p of this.parent) if (p >= 0) this.childStart[p + 1]++;
    for (let j = 0; j < this.count; j++) this.childStart[j + 1] += this.childStart[j];
    const at = this.childStart.slice();
    this.child = new Uint32Array(this.childStart[this.count]);
    this.parent.forEach((p, j) => { if (p >= 0) this.child[at[p]++] = j; });
  }

  density(j) { return this.fired[j] / this.meta.n_tokens; }
  cosine(j) { return this.parentCosine[j] / 10000; }
  children(j) { return this.child.subarray(this.childStart[j], this.childStart[j + 1]); }

  // Tokens that hold parts of one character are shown as one.
  pieces(ids, from = 0, to = ids.length) {
    const out = [];
    for (let i = from; i < to; i++) {
      const piece = this.vocabulary[ids[i]];
      if (typeof piece === "string") { out.push({ text: piece, from: i, to: i + 1 }); continue; }
      const bytes = [];
      let k = i, text = null;
      while (k < to && typeof this.vocabulary[ids[k]] !== "string" && text === null) {
        bytes.push(...this.vocabulary[ids[k++]]);
        try { text = new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes)); } catch { text = null; }
      }
      out.push(text === null ? { text: "\ufffd", from: i, to: (k = i + 1) } : { text, from: i, to: k });
      i = k - 1;
    }
    return out;
  }

  tokenText(id) { return this.pieces([id])[0].text; }

  example(j, e) {
    const at = j * this.examples + e, start = this.exampleStart[at];
    if (start === NONE) return null;
    const length = this.exampleLength[at], window = this.meta.window;
    return { start, length, peak: this.examplePeak[at], value: (this.exampleValue[at] / 65535) * this.largest[j], ids: this.stream.subarray(start, start + length), acts: this.exampleActs.subarray(at * window, at * window + length) };
  }

  label(j) {
    const best = this.example(j, 0);
    if (!best) return "";
    const piece = this.pieces(best.ids).find((p) => p.from <= best.peak && best.peak < p.to);
    return piece ? piece.text : "";
  }

  // All contexts as one text in lower case, with the place of every token in it; made when first searched.
  text() {
    if (this.joined === undefined) {
      const parts = new Array(this.stream.length).fill("");
      for (const piece of this.pieces(this.stream)) parts[piece.from] = piece.text.toLowerCase();
      this.textStart = new Uint32Array(parts.length + 1);
      parts.forEach((part, i) => { this.textStart[i + 1] = this.textStart[i] + part.length; });
      this.joined = parts.join("");
    }
    return this.joined;
  }

  // First and last token of every place where the text occurs.
  hits(query) {
    const text = this.text(), first = [], last = [];
    let token = 0, end = 0;
    for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + 1)) {
      while (this.textStart[token + 1] <= at) token++;
      while (this.textStart[end + 1] < at + query.length) end++;
      first.push(token); last.push(end);
    }
    return { first, last };
  }

  // For each latent, whether a context of it holds the text.
  inContexts(query) {
    const found = new Uint8Array(this.count), { first, last } = this.hits(query);
    if (!first.length) return found;
    for (let at = 0; at < this.exampleStart.length; at++) {
      const start = this.exampleStart[at];
      if (start === NONE) continue;
      let low = 0, high = first.length;
      while (low < high) { const mid = (low + high) >> 1; if (first[mid] < start) low = mid + 1; else high = mid; }
      if (low < first.length && last[low] < start + this.exampleLength[at]) found[Math.floor(at / this.examples)] = 1;
    }
    return found;
  }

  // Which tokens of the vocabulary hold the text.
  tokensWith(query) {
    return Uint8Array.from(this.vocabulary, (piece) => (typeof piece === "string" && piece.toLowerCase().includes(query) ? 1 : 0));
  }

  inPeaks(query) {
    const found = new Uint8Array(this.count), holds = this.tokensWith(query);
    for (let at = 0; at < this.exampleStart.length; at++)
      if (this.exampleStart[at] !== NONE && holds[this.stream[this.exampleStart[at] + this.examplePeak[at]]]) found[Math.floor(at / this.examples)] = 1;
    return found;
  }

  inLogits(query) {
    const found = new Uint8Array(this.count), n = this.meta.n_logits;
    if (!n) return found;
    const holds = this.tokensWith(query);
    for (let at = 0; at < this.topToken.length; at++) if (holds[this.topToken[at]]) found[Math.floor(at / n)] = 1;
    return found;
  }
}
