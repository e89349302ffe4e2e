// The conversation: asking, streaming, stopping, saying it again; under each answer what it took.
import { $, make, ms, prose } from "./dom.js";
import { streamAnswer } from "./stream.js";

const STAGES = [
  ["prefill_queue", "waiting"], ["prefill", "prefill"], ["transfer", "transfer"], ["decode_queue", "waiting for decode"],
  ["decode", "decode"], ["other", "other"],
];

// The conversation as the model should see it: a question that got no text, because it was refused or stopped, would fail every later one.
export function heard(messages) {
  return messages.filter((one, at) => one.role !== "user" || at === messages.length - 1 || messages[at + 1].role === "assistant");
}

export class Chat {
  constructor(settings) {
    this.settings = settings;
    this.model = null;
    this.messages = [];
    this.going = null;
    this.talk = $("#talk");
    this.blank = $("#empty");
  }

  get busy() { return this.going !== null; }

  clear() {
    this.stop();
    this.messages = [];
    this.talk.replaceChildren(this.blank);
    $("#question").focus();
  }

  stop() { this.going?.abort(); }

  ask(text) {
    this.blank.remove();
    this.messages.push({ role: "user", content: text });
    this.talk.append(make("div", { className: "mine" }, make("p", { textContent: text })));
    return this.answer();
  }

  again(block) {
    if (this.busy || block !== this.talk.lastElementChild) return undefined;
    if (this.messages.at(-1)?.role === "assistant") this.messages.pop();
    block.remove();
    return this.answer();
  }

  async answer() {
    const said = make("div", { className: "said" });
    const block = make("article", { className: "answer going" }, said);
    for (const old of this.talk.querySelectorAll(".again")) old.remove();
    this.talk.append(block);
    const going = (this.going = new AbortController());
    this.buttons();
    const shown = { text: "", tokens: 0, dirty: false };
    const draw = () => {
      shown.dirty = false;
      const near = this.talk.scrollHeight - this.talk.scrollTop - this.talk.clientHeight < 80;
      said.replaceChildren(...prose(shown.text));
      if (near) this.talk.scrollTop = this.talk.scrollHeight;
    };
    this.talk.scrollTop = this.talk.scrollHeight;
    let problem = null, told = null;
    try {
      const system = this.settings.system.trim();
      const messages = [...(system ? [{ role: "system", content: system }] : []), ...heard(this.messages)];
      if (!this.model) throw new Error("The server has not answered yet.");
      told = await streamAnswer(this.settings, this.model, messages, going.signal, (piece) => {
        shown.text += piece;
        if (!shown.dirty) { shown.dirty = true; requestAnimationFrame(draw); }
      });
    } catch (error) {
      problem = going.signal.aborted ? "Stopped." : error instanceof TypeError ? "The server cannot be reached." : error.message;
    }
    if (this.going === going) this.going = null;
    draw();
    block.classList.remove("going");
    if (!block.isConnected) { this.buttons(); return; }
    if (shown.text) this.messages.push({ role: "assistant", content: shown.text });
    if (problem) block.append(make("p", { className: going.signal.aborted ? "problem quiet" : "problem", textContent: problem }));
    block.append(this.figures(told, block));
    this.talk.scrollTop = this.talk.scrollHeight;
    this.buttons();
  }

  figures(told, block) {
    const again = make("button", { className: "plain again", type: "button", textContent: "Say it again", onclick: () => this.again(block) });
    const line = make("div", { className: "line" });
    const box = make("div", { className: "told" }, line);
    if (told?.timeline) {
      const time = told.timeline;
      const tpot = told.tokens > 1 ? (time.total_ms - time.ttft_ms) / (told.tokens - 1) : null;
      const figure = (name, text, missed) => make("span", { className: missed ? "missed" : "", title: missed ? "beyond the objective" : "" }, `${name} `, make("b", { textContent: text }));
      line.append(figure("TTFT", ms(time.ttft_ms), time.ttft_ms > this.settings.ttft_ms));
      if (tpot !== null) line.append(figure("TPOT", ms(tpot), tpot > this.settings.tpot_ms), figure("", `${(1000 / tpot).toFixed(1)} tokens/s`));
      line.append(figure("", `${told.tokens} tokens`));
      if (time.attempts > 1) line.append(figure("attempts", String(time.attempts)));
      if (told.finish === "length") line.append(make("span", { textContent: "cut at most tokens" }));
      const stages = STAGES.map(([name, label]) => [name, label, time[`${name}_ms`]]).filter(([, , value]) => value > 0.05);
      const bar = make("div", { className: "bar", role: "img" });
      bar.setAttribute("aria-label", stages.map(([, label, value]) => `${label} ${ms(value)}`).join(", "));
      for (const [name, label, value] of stages) {
        const piece = make("i", { className: name, title: `${label}: ${ms(value)}` });
        piece.style.flexGrow = value;
        bar.append(piece);
      }
      box.append(bar, make("div", { className: "key" }, ...stages.map(([name, label, value]) => make("span", { className: name, textContent: `${label} ${ms(value)}` }))));
    }
    line.append(again);
    return box;
  }

  buttons() {
    $("#send").hidden = this.busy;
    $("#stop").hidden = !this.busy;
  }
}
