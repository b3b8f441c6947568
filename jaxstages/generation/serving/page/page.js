/**
 * The page: connects its parts.
 *
 * In view "chat" one model continues a conversation. In view "compare" every stage answers the same question, and each
 * question stands alone.
 */

import { ApiError, listModels, streamAnswer } from "./api.js";
import { Answer, Conversation } from "./conversation.js";
import { byId, fit, make, onEnter, setText } from "./elements.js";
import { connectExport, openExport } from "./export.js";
import { makeProblem } from "./problems.js";
import { connectSettings, samplingFields, systemPrompt } from "./settings.js";
import { clearDetail, followTokens } from "./token_view.js";
import { formatHint, TurnView } from "./turn_view.js";

const ASKING = "[data-action='edit'], [data-action='again'], [data-action='compare'], [data-action='regenerate']";
const NEAR_END = 120; // pixels; who reads further up is not scrolled down

class Page {
  #models = [];
  #mode = "chat";
  #conversations = { chat: new Conversation(), compare: new Conversation() };
  #previous = { chat: null, compare: null };
  #views = new Map();
  #running = null;
  #isRenderQueued = false;

  async start() {
    byId("problem").replaceChildren();
    try {
      this.#models = await listModels();
    } catch (error) {
      byId("problem").replaceChildren(makeProblem(error, { retry: () => this.start() }));
      return;
    }
    this.#showModels();
    this.#render();
    if (matchMedia("(pointer: fine)").matches) byId("message").focus(); // on a phone, a keyboard would cover the page
  }

  connect() {
    connectSettings();
    connectExport();
    followTokens(byId("turns"));

    const message = byId("message");
    onEnter(message, () => this.#send());
    message.addEventListener("input", () => fit(message));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", () => this.#stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog:modal")) this.#stop();
    });

    byId("model").addEventListener("change", () => this.#render());
    byId("modes").addEventListener("change", (event) => this.#setMode(event.target.value));
    byId("probabilities").addEventListener("change", () => this.#render());
    byId("new").addEventListener("click", () => this.#startAnew());
    byId("undo-new").addEventListener("click", () => this.#bringBack());
    byId("export").addEventListener("click", () => openExport(this.#conversation.toRecord(systemPrompt())));
  }

  get #conversation() {
    return this.#conversations[this.#mode];
  }

  get #model() {
    return this.#models.find((model) => model.id === byId("model").value);
  }

  #showModels() {
    const options = this.#models.map((model) => make("option", model.id));
    byId("model").replaceChildren(...options);
    byId("model").value = (this.#models.findLast((model) => model.chat) ?? this.#models.at(-1)).id;
    byId("modes").hidden = this.#models.length < 2;

    const stages = this.#models.flatMap((model) => [make("dt", model.id), make("dd", `${formatHint(model)}.`)]);
    byId("stages").replaceChildren(...stages);
  }

  // What people do ------------------------------------------------------------------------------------------------

  #send() {
    const message = byId("message");
    const question = message.value.trim();
    const sampling = question && !this.#running && this.#models.length ? samplingFields() : null;
    if (!sampling) return;

    message.value = "";
    fit(message);
    this.#answer(this.#conversation.add(question), sampling);
    scrollTo({ top: document.documentElement.scrollHeight });
  }

  #stop() {
    this.#running?.abort();
  }

  #edit(turn, question, accepted) {
    const sampling = this.#running ? null : samplingFields();
    if (!sampling) return;
    accepted();
    if (this.#mode === "chat") this.#conversation.edit(turn, question);
    else turn.question = question;
    this.#answer(turn, sampling);
  }

  #regenerate(turn) {
    const sampling = this.#running ? null : samplingFields();
    if (sampling) this.#answer(turn, sampling);
  }

  /** Ask again for the answers of a turn that failed. */
  #retry(turn) {
    const sampling = this.#running ? null : samplingFields();
    if (!sampling) return;
    const again = (answer) => (answer.error ? new Answer(answer.model) : answer);
    this.#answer(turn, sampling, turn.answers.map(again));
  }

  /** Forget as many turns as it takes: the server says whether the rest fits. */
  async #forget(turn) {
    const sampling = this.#running ? null : samplingFields();
    if (!sampling) return;
    while (this.#conversation.forgetOldest(turn)) {
      await this.#answer(turn, sampling);
      if (!turn.answers[0].error?.isOverfull) return;
    }
  }

  #compare(question) {
    if (this.#running) return;
    byId("modes").querySelector("[value='compare']").checked = true;
    this.#setMode("compare");
    byId("message").value = question;
    this.#send();
  }

  #setMode(mode) {
    this.#stop();
    this.#mode = mode;
    this.#render();
    scrollTo({ top: document.documentElement.scrollHeight });
  }

  #startAnew() {
    this.#stop();
    if (this.#conversation.turns.length) this.#previous[this.#mode] = this.#conversation;
    this.#conversations[this.#mode] = new Conversation();
    this.#render();
    byId("message").focus();
  }

  #bringBack() {
    this.#conversations[this.#mode] = this.#previous[this.#mode];
    this.#previous[this.#mode] = null;
    this.#render();
    byId("message").focus();
  }

  // Answers -------------------------------------------------------------------------------------------------------

  /** Answer a turn: by the chosen model, by all of them, or by `answers`, of which some may be complete already. */
  async #answer(turn, sampling, answers = this.#newAnswers()) {
    turn.answers = answers;
    const running = answers.filter((answer) => answer.isRunning);
    const conversation = this.#mode === "chat" ? this.#conversation : new Conversation();
    const messages = conversation.messagesTo(turn, systemPrompt());

    this.#running = new AbortController();
    const { signal } = this.#running;
    this.#announce(running.length > 1 ? "The stages are answering." : `${running[0].model.id} is answering.`);
    this.#render();
    this.#moveFocus("stop");
    try {
      await Promise.all(running.map((answer) => this.#stream(answer, messages, sampling, signal)));
    } finally {
      this.#running = null;
    }
    this.#announceEnd(running);
    this.#render();
    this.#moveFocus("send");
  }

  #newAnswers() {
    const models = this.#mode === "chat" ? [this.#model] : this.#models;
    return models.map((model) => new Answer(model));
  }

  async #stream(answer, messages, sampling, signal) {
    try {
      for await (const piece of streamAnswer(answer.model, messages, sampling, signal)) {
        answer.add(piece);
        this.#queueRender();
      }
    } catch (error) {
      if (signal.aborted) answer.isStopped = true;
      else if (error instanceof ApiError) answer.error = error;
      else throw error;
    } finally {
      answer.isRunning = false;
      this.#queueRender();
    }
  }

  /** Screen readers hear that an answer begins, and then all of it, but not each of its tokens. */
  #announceEnd(answers) {
    const finished = answers.filter((answer) => !answer.error);
    if (answers.length > 1) this.#announce(`${finished.length} of ${answers.length} stages have answered.`);
    else if (finished.length) this.#announce(`${finished[0].model.id}: ${finished[0].text || "no text"}`);
  }

  #announce(text) {
    byId("status").textContent = text;
  }

  /** Focus must not be lost with the button that had it: Send, Stop and Regenerate come and go. */
  #moveFocus(to) {
    const focused = document.activeElement;
    if (focused && focused !== document.body && focused.checkVisibility()) return;
    byId(to).focus();
  }

  // What is shown -------------------------------------------------------------------------------------------------

  /** Render the turn that is being answered, once a frame, however many tokens arrive. */
  #queueRender() {
    if (this.#isRenderQueued) return;
    this.#isRenderQueued = true;
    requestAnimationFrame(() => {
      this.#isRenderQueued = false;
      const running = this.#conversation.turns.filter((turn) => turn.isRunning);
      this.#keepAtEnd(() => running.forEach((turn) => this.#views.get(turn)?.render(byId("probabilities").checked)));
    });
  }

  #render() {
    this.#keepAtEnd(() => {
      this.#renderTurns();
      this.#renderControls();
    });
  }

  /** Keep the end in view while the page grows, but only if it was in view. */
  #keepAtEnd(render) {
    const page = document.documentElement;
    const isAtEnd = page.scrollHeight - page.clientHeight - page.scrollTop < NEAR_END;
    render();
    if (isAtEnd) scrollTo({ top: page.scrollHeight });
  }

  #renderTurns() {
    const { turns } = this.#conversation;
    for (const [turn, view] of this.#views) {
      if (turns.includes(turn)) continue;
      view.element.remove();
      this.#views.delete(turn);
    }
    for (const turn of turns) {
      if (!this.#views.has(turn)) {
        this.#views.set(turn, this.#makeView(turn));
        byId("turns").append(this.#views.get(turn).element);
      }
      this.#views.get(turn).render(byId("probabilities").checked);
    }
    if (!document.querySelector("[role='option'][aria-selected='true']")) clearDetail();
  }

  #makeView(turn) {
    const isChat = this.#mode === "chat";
    const actions = {
      edit: (...args) => this.#edit(...args),
      regenerate: (...args) => this.#regenerate(...args),
      retry: (...args) => this.#retry(...args),
      forget: (...args) => this.#forget(...args),
      compare: isChat && this.#models.length > 1 ? (question) => this.#compare(question) : null,
      isLast: (each) => !isChat || this.#conversation.turns.at(-1) === each,
      hasEarlier: (each) => isChat && this.#conversation.turns.find((turn) => !turn.isForgotten) !== each,
    };
    return new TurnView(turn, actions, "Later turns are removed.");
  }

  #renderControls() {
    const isChat = this.#mode === "chat";
    const { turns } = this.#conversation;
    const isRunning = this.#running !== null;
    document.body.classList.toggle("compare", !isChat);
    byId("model-field").hidden = !isChat || this.#models.length < 2;
    byId("export").hidden = !isChat || isRunning || !this.#conversation.toRecord("");
    byId("new").hidden = !turns.length;
    byId("send").hidden = isRunning;
    byId("stop").hidden = !isRunning;
    byId("inspector").hidden = !byId("probabilities").checked;
    for (const button of byId("turns").querySelectorAll(ASKING)) button.disabled = isRunning;

    byId("welcome").hidden = turns.length > 0 || !this.#models.length;
    byId("undo-new").hidden = !this.#previous[this.#mode];
    byId("main-title").textContent = isChat ? "Conversation" : "Comparison of the stages";
    byId("welcome-lead").textContent = isChat
      ? `${this.#model?.chat ? "Talk to" : "Try"} ${this.#model?.id}.`
      : "What did each stage teach? Ask all of them the same question.";

    const hint = this.#model && !this.#model.chat ? `${this.#model.id} reads only the last message.` : "";
    setText(byId("stage-hint"), isChat ? hint : "Each question stands alone.");
    setText(byId("context-use"), isChat && this.#model ? contextUse(this.#model, turns) : "");
  }
}

function contextUse(model, turns) {
  const used = turns.findLast((turn) => turn.answers[0].usage)?.answers[0].usage.total_tokens ?? 0;
  return `Context ${used.toLocaleString("en")} of ${model.context.toLocaleString("en")}`;
}

const page = new Page();
page.connect();
page.start();
