/** The probabilities of an answer's tokens: marks in its text, and the alternatives to one token in the dock. */

import { byId, make } from "./elements.js";
import { alignTokens, formatPercent, levelOf, probabilityOf, spokenText, visibleText } from "./tokens.js";

/**
 * Show an answer's text, with marked tokens or without.
 *
 * Only what has changed since the last call is replaced, so that a selection survives while the answer is streamed.
 */
export function showText(element, answer, withProbabilities) {
  const text = answer.text.trimStart(); // a text that is continued goes on with a space
  if (!withProbabilities || !answer.tokens.length) {
    if (element.role) clear(element);
    showPlainText(element, text);
    return;
  }

  if (!element.role) {
    clear(element);
    element.role = "listbox";
    element.ariaOrientation = "horizontal";
    element.ariaLabel = "Tokens of the answer";
  }
  const spans = alignTokens(text, answer.tokens);
  const kept = countKept(element, spans);
  while (element.children.length > kept) element.lastChild.remove();
  for (const span of spans.slice(kept)) element.append(makeSpan(span));
  if (!element.querySelector("[tabindex='0']") && element.firstChild) element.firstChild.tabIndex = 0;
}

function clear(element) {
  element.replaceChildren();
  for (const name of ["role", "aria-orientation", "aria-label"]) element.removeAttribute(name);
}

function showPlainText(element, text) {
  const node = element.firstChild;
  if (node && text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else element.replaceChildren(document.createTextNode(text));
}

/** Count the first spans that are shown as they are. The last one may still get more text. */
function countKept(element, spans) {
  const shown = element.children;
  let kept = 0;
  while (kept < Math.min(shown.length - 1, spans.length) && shown[kept].span.text === spans[kept].text) kept += 1;
  return kept;
}

function makeSpan(span) {
  const text = span.text || span.tokens.map((token) => token.text).join("");
  const probability = probabilityOf(span.tokens);
  const element = make("span", "", "token");
  element.span = span;
  element.role = "option";
  element.tabIndex = -1;
  element.ariaSelected = "false";

  // The space before a word is not marked, so that one can see where a token begins.
  const word = text.trimStart() || text;
  const mark = make("span", word, `mark level-${levelOf(probability)}`);
  mark.classList.toggle("control", !span.text);
  element.append(text.slice(0, text.length - word.length), mark);

  const others = span.tokens.length === 1 ? otherTokens(span.tokens[0]) : [];
  const spoken = others.slice(0, 3).map(({ text, logProb }) => `${spokenText(text)} ${formatPercent(Math.exp(logProb))}`);
  const instead = spoken.length ? `; instead: ${spoken.join(", ")}` : "";
  element.ariaLabel = `${spokenText(text)}, ${formatPercent(probability)}${instead}`;
  return element;
}

function otherTokens(token) {
  return token.alternatives.filter((other) => other.text !== token.text);
}

// The token that is looked at --------------------------------------------------------------------------------------

/** Follow pointer, touch, focus and arrow keys over the tokens in an element. */
export function followTokens(root) {
  const tokenOf = (event) => event.target.closest?.("[role='option']");

  root.addEventListener("pointerover", (event) => tokenOf(event) && select(tokenOf(event)));
  root.addEventListener("focusin", (event) => tokenOf(event) && select(tokenOf(event)));
  root.addEventListener("click", (event) => tokenOf(event)?.focus());
  root.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    const next = token && nextToken(token, event.key);
    if (!next) return;
    event.preventDefault();
    next.focus();
  });
}

function nextToken(token, key) {
  const isLeftToRight = getComputedStyle(token).direction === "ltr";
  const forward = isLeftToRight ? "ArrowRight" : "ArrowLeft";
  const backward = isLeftToRight ? "ArrowLeft" : "ArrowRight";
  if (key === forward || key === "ArrowDown") return token.nextElementSibling;
  if (key === backward || key === "ArrowUp") return token.previousElementSibling;
  if (key === "Home") return token.parentElement.firstElementChild;
  if (key === "End") return token.parentElement.lastElementChild;
  return null;
}

function select(token) {
  for (const old of document.querySelectorAll("[role='option'][aria-selected='true']")) old.ariaSelected = "false";
  token.ariaSelected = "true";
  for (const sibling of token.parentElement.children) sibling.tabIndex = sibling === token ? 0 : -1;
  showDetail(token.span);
}

/** Show the chosen token and its alternatives, or the tokens that make up a character. */
function showDetail(span) {
  const [token] = span.tokens;
  const rows = span.tokens.length === 1 ? [token, ...otherTokens(token)] : span.tokens;
  const items = rows.map((row, number) => {
    const probability = Math.exp(row.logProb);
    const item = make("li");
    item.append(make("span", visibleText(row.text), "token-text"), make("span", formatPercent(probability), "percent"));
    item.style.setProperty("--share", `${100 * probability}%`);
    item.classList.toggle("chosen", number === 0 || span.tokens.length > 1);
    if (number === 0) item.prepend(make("span", "chosen: ", "hidden"));
    return item;
  });
  byId("alternatives").replaceChildren(...items);
  byId("alternatives").hidden = false;
  byId("detail-hint").hidden = true;
}

/** Show the hint again, for example when the answer of the token is gone. */
export function clearDetail() {
  byId("alternatives").hidden = true;
  byId("detail-hint").hidden = false;
}
