/** The panel with the system prompt and the sampling parameters: a column on wide screens, a dialog on narrow ones. */

import { byId, fit } from "./elements.js";

const WIDE = matchMedia("(min-width: 64rem)");

export function systemPrompt() {
  return byId("system").value;
}

/** Return the sampling parameters that are filled in, or null after pointing at a wrong one. */
export function samplingFields() {
  const inputs = [...byId("knobs").elements].filter((element) => element.type === "number");
  const wrong = inputs.find((input) => !input.checkValidity());
  if (wrong) {
    openSettings(wrong.name);
    wrong.reportValidity();
    return null;
  }
  const filled = inputs.filter((input) => input.value !== "");
  return Object.fromEntries(filled.map((input) => [input.name, input.valueAsNumber]));
}

/** Return whether a field of a request is one of the panel's. */
export function isSetting(name) {
  return byId("knobs").elements.namedItem(name ?? "") !== null;
}

/** Open the panel, at a field if one is named. */
export function openSettings(field = "") {
  const panel = byId("settings");
  if (!panel.open) {
    if (WIDE.matches) panel.show();
    else panel.showModal();
  }
  byId("open-settings").ariaExpanded = "true";
  fit(byId("system"));
  if (field) byId("knobs").elements.namedItem(field).focus();
}

export function connectSettings() {
  const panel = byId("settings");
  const opener = byId("open-settings");

  opener.addEventListener("click", () => (panel.open ? panel.close() : openSettings()));
  byId("close-settings").addEventListener("click", () => panel.close());
  byId("system").addEventListener("input", () => fit(byId("system")));
  byId("knobs").addEventListener("submit", (event) => event.preventDefault());
  panel.addEventListener("close", () => {
    opener.ariaExpanded = "false";
    opener.focus();
  });
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation(); // Escape also stops an answer
    panel.close();
  });
  WIDE.addEventListener("change", () => panel.open && panel.close());
}
