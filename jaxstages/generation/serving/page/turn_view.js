/** Turns as elements: a question with one answer, or with one of each stage. */

import { action, clone, copyText, fit, onEnter, part, setText } from "./elements.js";
import { makeProblem } from "./problems.js";
import { showText } from "./token_view.js";

const FORMATS = {
  lm: "Continues your text",
  seq2seq: "Reads your message as a source, and writes its target",
  classify: "Reads your message as a text, and writes its label",
  chat: "Answers your message as a turn of a chat",
};

/** Say in what format a model reads a message. */
export function formatHint(model) {
  return FORMATS[model.task] ?? "Reads your message as a prompt of its own task";
}

/**
 * The element of a turn.
 *
 * @param {Turn} turn
 * @param {object} actions - Functions of the turn: edit(turn, question, accepted), regenerate(turn), retry(turn),
 *     forget(turn), isLast(turn), hasEarlier(turn), and compare(question), which is null where it makes no sense.
 * @param {string} editHint - What editing does to the turns after this one.
 */
export class TurnView {
  #answers = new Map();
  #text;

  constructor(turn, actions, editHint) {
    this.turn = turn;
    this.element = clone("turn-template");
    this.actions = actions;
    this.editHint = editHint;
    this.#text = part(this.element, "text");
    this.#connect();
  }

  #connect() {
    const compare = action(this.element, "compare");
    action(this.element, "edit").addEventListener("click", () => this.#edit());
    compare.hidden = !this.actions.compare;
    compare.addEventListener("click", () => this.actions.compare(this.turn.question));
    action(this.element, "again").addEventListener("click", () => this.actions.regenerate(this.turn));
  }

  /** Show the turn as it is. */
  render(withProbabilities) {
    const { turn, element } = this;
    if (this.#text.textContent !== turn.question) this.#text.textContent = turn.question;
    part(element, "forgotten").hidden = !turn.isForgotten;
    element.classList.toggle("forgotten", turn.isForgotten);
    action(element, "edit").hidden = turn.isRunning || turn.isForgotten;
    action(element, "again").hidden = turn.isRunning || turn.answers.length < 2;

    for (const [answer, view] of this.#answers) {
      if (turn.answers.includes(answer)) continue;
      view.element.remove();
      this.#answers.delete(answer);
    }
    turn.answers.forEach((answer, number) => this.#renderAnswer(answer, number, withProbabilities));
    this.#offerOneRemedy();
  }

  /** Stages fail together if the server is gone, or wants a key. One remedy is for all of them. */
  #offerOneRemedy() {
    const remedies = [...this.element.querySelectorAll(".problem .actions, .problem .key")];
    remedies.forEach((remedy, number) => (remedy.hidden = number > 0));
  }

  #renderAnswer(answer, number, withProbabilities) {
    let view = this.#answers.get(answer);
    if (!view) {
      view = new AnswerView(answer, this);
      this.#answers.set(answer, view);
      const container = part(this.element, "answers");
      container.insertBefore(view.element, container.children[number] ?? null);
    }
    view.render(withProbabilities);
  }

  #edit() {
    const form = clone("edit-template");
    const area = form.querySelector("textarea");
    const buttons = part(this.element, "actions");
    area.value = this.turn.question;
    part(form, "hint").textContent = this.actions.isLast(this.turn) ? "" : this.editHint;

    const close = () => {
      form.replaceWith(this.#text);
      buttons.hidden = false;
      action(buttons, "edit").focus();
    };
    const submit = () => {
      const question = area.value.trim();
      if (question) this.actions.edit(this.turn, question, close);
    };

    onEnter(area, submit);
    area.addEventListener("input", () => fit(area));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      submit();
    });
    form.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation(); // Escape also stops an answer
      close();
    });
    action(form, "cancel").addEventListener("click", close);

    this.#text.replaceWith(form);
    buttons.hidden = true;
    fit(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

class AnswerView {
  #shownError = null;

  constructor(answer, turnView) {
    this.answer = answer;
    this.turnView = turnView;
    this.element = clone("answer-template");
    part(this.element, "name").textContent = answer.model.id;

    const copy = action(this.element, "copy");
    copy.addEventListener("click", async () => {
      copy.textContent = (await copyText(answer.text)) ? "Copied" : "Not copied";
      setTimeout(() => (copy.textContent = "Copy"), 2000);
    });
    const { actions, turn } = turnView;
    action(this.element, "regenerate").addEventListener("click", () => actions.regenerate(turn));
  }

  render(withProbabilities) {
    const { answer, element } = this;
    const { actions, turn } = this.turnView;
    const isCompared = turn.answers.length > 1;
    element.ariaBusy = String(answer.isRunning);
    element.classList.toggle("running", answer.isRunning);
    showText(part(element, "text"), answer, withProbabilities);
    setText(part(element, "hint"), isCompared || !answer.model.chat ? `${formatHint(answer.model)}.` : "");
    setText(part(element, "note"), noteOf(answer));
    setText(part(element, "usage"), usageOf(answer));

    this.#renderProblem();
    const hasFailed = answer.error !== null;
    part(element, "foot").hidden = answer.isRunning || (hasFailed && !answer.hasText);
    action(element, "copy").hidden = !answer.hasText;
    action(element, "regenerate").hidden = isCompared || hasFailed || !actions.isLast(turn);
  }

  #renderProblem() {
    const { answer, element } = this;
    if (answer.error === this.#shownError) return;
    this.#shownError = answer.error;

    const { actions, turn } = this.turnView;
    const remedies = {
      retry: () => actions.retry(turn),
      forget: actions.hasEarlier(turn) ? () => actions.forget(turn) : null,
    };
    const problem = answer.error && makeProblem(answer.error, remedies);
    part(element, "problem").replaceChildren(...(problem ? [problem] : []));
  }
}

function noteOf(answer) {
  if (answer.isRunning || answer.error) return "";
  if (answer.isStopped) return "Stopped.";
  if (answer.finishReason === "length") {
    const total = answer.usage?.total_tokens ?? 0;
    return total >= answer.model.context ? "Cut off: the context is full." : "Cut off at the longest answer.";
  }
  return answer.hasText ? "" : "The answer is empty.";
}

function usageOf(answer) {
  if (answer.isRunning) return "";
  const { usage, firstSeconds, rate, tokens } = answer;
  const counts = usage
    ? `${usage.prompt_tokens} prompt + ${usage.completion_tokens} new tokens`
    : `${tokens.length} new tokens`;
  const first = firstSeconds === null ? "" : `first after ${firstSeconds.toFixed(2)}\u00a0s`;
  const speed = rate === null ? "" : `${rate.toFixed(rate < 10 ? 1 : 0)}\u00a0tokens/s`;
  return [counts, first, speed].filter(Boolean).join(" \u00b7 ");
}
