/** Tokens and their probabilities: where they are in a text, and how they are written. */

/**
 * Divide a text into spans of tokens.
 *
 * Most tokens are a part of the text. Some are not: a part of a character, a control token, a first space that decoding
 * takes away. Such tokens get the text up to where the next token continues, which may be none.
 *
 * @returns {{text: string, tokens: object[]}[]}
 */
export function alignTokens(text, tokens) {
  const spans = [];
  let position = 0;
  let waiting = [];

  for (const token of tokens) {
    const start = findToken(text, token.text, position, waiting.length);
    if (start === null) {
      waiting.push(token);
      continue;
    }
    if (waiting.length) spans.push({ text: text.slice(position, start.at), tokens: waiting });
    spans.push({ text: text.slice(start.at, start.end), tokens: [token] });
    position = start.end;
    waiting = [];
  }

  if (waiting.length || position < text.length) spans.push({ text: text.slice(position), tokens: waiting });
  return spans;
}

/** Find a token at `position`, or shortly after it if tokens before it are waiting for their text. */
function findToken(text, token, position, numWaiting) {
  const at = text.indexOf(token, position);
  if (token && at >= position && at - position <= 4 * numWaiting) return { at, end: at + token.length };

  const trimmed = token.trimStart();
  if (trimmed && trimmed !== token && numWaiting === 0 && text.startsWith(trimmed, position)) {
    return { at: position, end: position + trimmed.length };
  }
  return null;
}

/** Return the probability of a span: that of all its tokens together. */
export function probabilityOf(tokens) {
  return Math.exp(tokens.reduce((sum, token) => sum + token.logProb, 0));
}

/** Return the level of a probability in the legend, 0 to 3. */
export function levelOf(probability) {
  return [0.1, 0.5, 0.9].filter((bound) => probability >= bound).length;
}

export function formatPercent(probability) {
  if (probability > 0.9995) return ">99.9%";
  if (probability < 0.0005) return "<0.1%";
  return `${(100 * probability).toFixed(1)}%`;
}

/** Return a token's text with visible spaces and line breaks. */
export function visibleText(text) {
  return text.replaceAll(" ", "\u2423").replaceAll("\n", "\u21b5").replaceAll("\t", "\u21e5") || "\u2205";
}

/** Return a token's text as a screen reader can say it. */
export function spokenText(text) {
  if (!text) return "no text";
  return text.trim() || (text.includes("\n") ? "line break" : "space");
}
