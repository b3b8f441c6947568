/** The dialog that shows a conversation as a training record, to be edited, copied or downloaded. */

import { byId, copyText } from "./elements.js";

export function openExport(record) {
  byId("record").value = JSON.stringify(record);
  byId("export-note").textContent = "";
  byId("export-dialog").showModal();
}

export function connectExport() {
  const dialog = byId("export-dialog");
  byId("close-export").addEventListener("click", () => dialog.close());

  byId("copy-record").addEventListener("click", async () => {
    const line = readRecord();
    if (line) byId("export-note").textContent = (await copyText(line)) ? "Copied." : "The browser did not copy it.";
  });
  byId("download").addEventListener("click", () => {
    const line = readRecord();
    if (line) download(`${line}\n`, "conversation.jsonl");
  });
}

/** Return the edited record as one line, or null after saying what is wrong with it. */
function readRecord() {
  try {
    return JSON.stringify(JSON.parse(byId("record").value));
  } catch (error) {
    byId("export-note").textContent = `This is not JSON: ${error.message}`;
    return null;
  }
}

function download(text, name) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/jsonl" }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
  byId("export-note").textContent = `Downloaded as ${name}.`;
}
