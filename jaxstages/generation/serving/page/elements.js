/** Helpers for elements. Text is only ever set as text. */

export function byId(id) {
  return document.getElementById(id);
}

/** Clone a template's element. */
export function clone(id) {
  return byId(id).content.firstElementChild.cloneNode(true);
}

/** Find a marked part of a cloned template. */
export function part(element, name) {
  return element.querySelector(`[data-part="${name}"]`);
}

export function action(element, name) {
  return element.querySelector(`[data-action="${name}"]`);
}

/** Make an element with a text. */
export function make(tag, text = "", className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

/** Set an element's text, and hide it if there is none. */
export function setText(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

/** Let a text area grow with its text. */
export function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

/** Call `submit` on Enter without Shift, but not while an input method composes a character. */
export function onEnter(area, submit) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
}

/**
 * Copy text. Without the clipboard's API, as on pages that are not served by HTTPS, the browser copies a selection.
 *
 * @returns {Promise<boolean>} Whether it was copied.
 */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const area = make("textarea", "", "hidden");
    area.value = text;
    (document.querySelector("dialog:modal") ?? document.body).append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return isCopied;
  }
}
