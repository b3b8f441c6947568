/** Conversations as data: turns of a question and its answers. Nothing here knows the page. */

const SHORTEST = 20; // milliseconds over which a rate is measured

/** An answer, while it is streamed and after. */
export class Answer {
  text = "";
  tokens = [];
  finishReason = null;
  usage = null;
  error = null;
  isRunning = true;
  isStopped = false;

  #started = performance.now();
  #first = null;
  #last = null;

  constructor(model) {
    this.model = model;
  }

  add(piece) {
    this.text += piece.text;
    this.tokens.push(...piece.tokens);
    this.finishReason = piece.finishReason ?? this.finishReason;
    this.usage = piece.usage ?? this.usage;

    if (piece.tokens.length) {
      this.#last = performance.now();
      this.#first ??= { time: this.#last, tokens: piece.tokens.length };
    }
  }

  get hasText() {
    return this.text.trim() !== "";
  }

  /** Seconds to the first token, or null. */
  get firstSeconds() {
    return this.#first && (this.#first.time - this.#started) / 1000;
  }

  /** Tokens per second after the first ones, or null if they came in too short a time to measure. */
  get rate() {
    const tokens = this.tokens.length - (this.#first?.tokens ?? 0);
    const milliseconds = this.#last - (this.#first?.time ?? 0);
    return tokens > 0 && milliseconds >= SHORTEST ? (1000 * tokens) / milliseconds : null;
  }
}

/** A question with an answer, or with one of each stage. A forgotten turn is shown, but no longer sent. */
export class Turn {
  answers = [];
  isForgotten = false;

  constructor(question) {
    this.question = question;
  }

  get isRunning() {
    return this.answers.some((answer) => answer.isRunning);
  }
}

export class Conversation {
  turns = [];

  add(question) {
    const turn = new Turn(question);
    this.turns.push(turn);
    return turn;
  }

  /** Change a question; the turns after it answer something else, and go. */
  edit(turn, question) {
    turn.question = question;
    this.turns.length = this.turns.indexOf(turn) + 1;
  }

  /** Forget the oldest turn before this one. Returns false if there is none. */
  forgetOldest(turn) {
    const oldest = this.turns.slice(0, this.turns.indexOf(turn)).find((each) => !each.isForgotten);
    if (oldest) oldest.isForgotten = true;
    return oldest !== undefined;
  }

  /** Return the messages that a turn's answer has to answer. Turns without an answer are left out. */
  messagesTo(turn, system) {
    const earlier = this.turns.slice(0, this.turns.indexOf(turn));
    return [...systemMessages(system), ...exchanges(earlier), { role: "user", content: turn.question }];
  }

  /** Return the conversation as a training record, or null if there is no answer in it. */
  toRecord(system) {
    const messages = exchanges(this.turns);
    return messages.length ? { messages: [...systemMessages(system), ...messages] } : null;
  }
}

function systemMessages(system) {
  return system.trim() ? [{ role: "system", content: system.trim() }] : [];
}

function exchanges(turns) {
  const answered = turns.filter((turn) => !turn.isForgotten && !turn.isRunning && turn.answers[0]?.hasText);
  return answered.flatMap((turn) => [
    { role: "user", content: turn.question },
    { role: "assistant", content: turn.answers[0].text },
  ]);
}
