/** Errors as people meet them: what happened, and a remedy to click. */

import { action, clone, make, part } from "./elements.js";
import { setKey } from "./api.js";
import { isSetting, openSettings } from "./settings.js";

/**
 * Make the element that shows an error.
 *
 * @param {ApiError} error
 * @param {object} remedies
 * @param {function} remedies.retry - Sends the request again.
 * @param {?function} remedies.forget - Forgets the oldest turns and sends again; null if there are none.
 */
export function makeProblem(error, { retry, forget = null }) {
  const element = clone("problem-template");
  const { text, label, remedy } = describe(error, retry, forget);
  part(element, "text").textContent = text;

  const button = action(element, "remedy");
  if (error.status === 401) {
    button.closest("p").replaceWith(makeKeyForm(retry));
  } else if (remedy) {
    button.textContent = label;
    button.addEventListener("click", remedy);
  } else {
    button.closest("p").remove();
  }
  return element;
}

function describe(error, retry, forget) {
  const again = { label: "Try again", remedy: retry };
  if (error.isOverfull) {
    const text = `The context is full: ${error.message}.`;
    if (forget) return { text, label: "Drop the oldest turns", remedy: forget };
    return { text: `${text} There are no earlier turns to drop: edit the message, or the system prompt.` };
  }
  if (error.status === 0) return { text: "The server does not answer. Is it still running?", ...again };
  if (error.status === 401) return { text: "The server asks for a key, and does not know this one, or got none." };
  if (error.status === 429) return { text: "The server is busy: too many requests wait.", ...again };
  if (isSetting(error.param)) {
    const remedy = () => openSettings(error.param);
    return { text: `${sentence(error.message)}`, label: "Open the settings", remedy };
  }
  return { text: sentence(error.message), ...again };
}

function sentence(message) {
  return message.charAt(0).toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
}

function makeKeyForm(retry) {
  const form = clone("key-template");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const key = form.querySelector("input").value.trim();
    if (!key) return;
    setKey(key);
    form.replaceWith(make("p", "Trying the key."));
    retry();
  });
  return form;
}
