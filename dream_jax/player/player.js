"use strict";
// The player shows how a canvas of mask tokens was denoised. The chat page and the replay files of sample.py share it.
// Text of a model or a person reaches the page as text nodes only, never as HTML.

const WORDS = {
  en: {
    language: "Language",
    play: "Play",
    pause: "Pause",
    step: "Step",
    speed: "Speed",
    colour: "Colour",
    byStep: "by step",
    byConfidence: "by confidence",
    byNothing: "none",
    early: "written early",
    late: "written late",
    unsure: "not confident",
    sure: "confident",
    canvas: "Canvas. The arrow keys move from token to token.",
    hint: "Point at a token, or move to it with the arrow keys.",
    blank: "blank canvas",
    stepOf: "step {step} of {steps}",
    writtenOf: "{written} of {length} tokens",
    masked: "not written yet",
    given: "given",
    position: "position {position}",
    atStep: "written in step {step}",
    probability: "confidence {value} (a probability or a margin)",
    entropy: "confidence {value} (minus the entropy in nats)",
    logprob: "probability {value}",
    runnerUps: "Other tokens at this step",
    end: "end of text",
  },
  zh: {
    language: "语言",
    play: "播放",
    pause: "暂停",
    step: "步骤",
    speed: "速度",
    colour: "着色",
    byStep: "按步骤",
    byConfidence: "按置信度",
    byNothing: "无",
    early: "先写入",
    late: "后写入",
    unsure: "置信度低",
    sure: "置信度高",
    canvas: "画布。用方向键在词元之间移动。",
    hint: "指向一个词元，或用方向键移动到它。",
    blank: "空白画布",
    stepOf: "第 {step} 步，共 {steps} 步",
    writtenOf: "已写入 {written} / {length} 个词元",
    masked: "尚未写入",
    given: "已给定",
    position: "位置 {position}",
    atStep: "第 {step} 步写入",
    probability: "置信度 {value}（概率或差值）",
    entropy: "置信度 {value}（负熵，单位 nat）",
    logprob: "概率 {value}",
    runnerUps: "这一步的其他候选",
    end: "文本结束",
  },
};

let language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";

/** Returns the words of a key in the chosen language, with {names} replaced by values. */
function say(key, values = {}) {
  return WORDS[language][key].replace(/\{(\w+)\}/g, (_, name) => String(values[name]));
}

/** Returns a new element. Attributes that are false, null or undefined are left out; texts become text nodes. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** Writes the words of the chosen language into all elements below `root` that name a key. */
function translate(root) {
  for (const [name, attribute] of [["say", null], ["sayLabel", "aria-label"], ["sayHint", "placeholder"]]) {
    const dashed = name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
    for (const node of root.querySelectorAll(`[data-${dashed}]`)) {
      const words = say(node.dataset[name]);
      if (attribute === null) node.textContent = words;
      else node.setAttribute(attribute, words);
    }
  }
}

/** Chooses the language of the page. */
function setLanguage(chosen) {
  language = chosen;
  document.documentElement.lang = chosen === "zh" ? "zh-Hans" : "en";
  translate(document);
  document.dispatchEvent(new Event("languagechosen"));
}

/** Fills a <select> with the languages. */
function offerLanguages(select) {
  select.append(element("option", {value: "en"}, "English"), element("option", {value: "zh"}, "中文"));
  select.value = language;
  select.addEventListener("change", () => setLanguage(select.value));
}

const stillness = matchMedia("(prefers-reduced-motion: reduce)");
const MASK_SIGN = "░";
const STEPS_A_SECOND = 8;

/** Whether a text is the name of a special token, such as <|endoftext|>. */
function isSpecial(text) {
  return /^<\|[^|]*\|>$/.test(text);
}

/** Returns the nodes that show a token in the canvas: signs stand for what would not be seen, or would change the rest. */
function shown(text) {
  if (isSpecial(text)) return [text === "<|endoftext|>" ? "∎" : text];
  const nodes = [];
  for (const piece of text.split(/(\r?\n|[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069])/)) {
    if (/^\r?\n$/.test(piece)) nodes.push(element("span", {class: "sign"}, "↵"), "\n");
    else if (/^[\u0000-\u001f]$/.test(piece)) nodes.push(String.fromCharCode(0x2400 + piece.charCodeAt(0)));
    else if (/^[\u007f-\u009f\u202a-\u202e\u2066-\u2069]$/.test(piece)) nodes.push("\ufffd");
    else if (piece) nodes.push(piece);
  }
  return nodes.length ? nodes : ["·"];
}

/** Returns a token in quotation marks, with line breaks and the like visible. */
function quoted(text) {
  return isSpecial(text) ? text : JSON.stringify(text).replace(/[\u202a-\u202e\u2066-\u2069\ufeff]/g, "\ufffd");
}

function rounded(value) {
  if (Math.abs(value) >= 0.01 || value === 0) return value.toFixed(2);
  return Math.abs(value) >= 0.001 ? value.toPrecision(1) : value.toExponential(0);
}

/**
 * The canvas of one answer with its controls.
 *
 * record: {parts, forced, tokens}. `parts` lists texts that were given and gaps {length}; positions count the tokens of all
 * gaps, from 0. A step that the person sees is the number of a step that wrote something, from 1. `forced` lists {position, text} that were written before the first step. `tokens` lists {position, text,
 * step, confidence, logprob, runner_ups}, of which the last three may be missing.
 */
class Player {
  constructor(record) {
    this.frames = [];
    this.frame = 0;
    this.cells = [];
    this.live = false;
    this.timer = null;
    this.lowest = 0;
    this.chosen = 0;
    this.buildCanvas(record.parts);
    this.buildTools();
    this.root = element("div", {class: "player", "data-colour": "step"}, this.canvas, this.tools, this.scale, this.about);
    for (const one of record.forced ?? []) this.fix(this.cells[one.position], one);
    this.add(record.tokens ?? []);
    this.show(this.frames.length);
    this.describe(null);
    translate(this.root);
    document.addEventListener("languagechosen", () => {
      for (const cell of this.cells) this.label(cell);
      this.refresh();
      this.describe(null);
    });
  }

  get length() {
    return this.cells.length;
  }

  buildCanvas(parts) {
    this.canvas = element("div", {class: "canvas", role: "group", "data-say-label": "canvas"});
    for (const part of parts) {
      if (typeof part === "string") {
        this.canvas.append(element("span", {class: "given"}, part));
        continue;
      }
      for (let count = 0; count < part.length; count++) {
        const node = element("span", {class: "cell mask", role: "img", tabindex: "-1"}, MASK_SIGN);
        const cell = {node, index: this.cells.length, entry: null, frame: 0, given: false, written: false};
        node.cell = cell;
        this.cells.push(cell);
        this.canvas.append(node);
        this.label(cell);
      }
    }
    if (this.cells.length) this.cells[0].node.tabIndex = 0;
    this.canvas.addEventListener("pointerover", (event) => this.describe(this.cellAt(event.target)));
    this.canvas.addEventListener("focusin", (event) => this.choose(this.cellAt(event.target)));
    this.canvas.addEventListener("click", (event) => this.choose(this.cellAt(event.target)));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
  }

  cellAt(target) {
    return target.closest(".cell")?.cell ?? null;
  }

  buildTools() {
    const option = (value, key) => element("option", {value, "data-say": key});
    this.button = element("button", {type: "button", class: "play"});
    this.slider = element("input", {type: "range", min: "0", max: "0", value: "0", step: "1", "data-say-label": "step"});
    this.output = element("output", {"aria-hidden": "true"});
    this.speed = element("select", {class: "speed"});
    for (const speed of [0.25, 0.5, 1, 2, 4, 16]) this.speed.append(element("option", {value: speed}, `${speed}×`));
    this.speed.value = "1";
    this.colour = element("select", {class: "colour"}, option("step", "byStep"));
    this.colour.append(option("confidence", "byConfidence"), option("none", "byNothing"));
    this.tools = element(
      "div", {class: "tools"}, this.button, this.slider, this.output,
      element("label", {}, element("span", {"data-say": "speed"}), this.speed),
      element("label", {}, element("span", {"data-say": "colour"}), this.colour),
    );
    this.low = element("span");
    this.high = element("span");
    this.scale = element("div", {class: "scale"}, this.low, element("i", {"aria-hidden": "true"}), this.high);
    this.about = element("div", {class: "about"});
    this.button.addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    this.slider.addEventListener("input", () => {
      const frame = Number(this.slider.value); // `pause` sets the slider back to the frame that is shown
      this.pause();
      this.show(frame);
    });
    this.speed.addEventListener("change", () => this.playing && !this.live && this.tick());
    this.colour.addEventListener("change", () => this.refresh());
  }

  /** Shows a token that was given before the first step. */
  fix(cell, entry) {
    if (cell === undefined) return;
    cell.entry = entry;
    cell.given = true;
    cell.node.replaceChildren(...shown(entry.text));
    cell.node.className = "cell given";
    this.label(cell);
  }

  /** Adds written tokens, sorted by their step. */
  add(tokens) {
    for (const entry of tokens) {
      const cell = this.cells[entry.position];
      if (cell === undefined) continue;
      cell.entry = entry;
      if (typeof entry.confidence === "number") this.lowest = Math.min(this.lowest, entry.confidence);
      const last = this.frames.at(-1);
      if (last !== undefined && last.step === entry.step) last.cells.push(cell);
      else this.frames.push({step: entry.step, cells: [cell]});
    }
    this.paint();
    this.refresh();
  }

  /** Gives each token the colours that stand for its step and its confidence. */
  paint() {
    const last = Math.max(this.frames.length - 1, 1);
    this.frames.forEach((frame, number) => {
      for (const cell of frame.cells) {
        const {node, entry} = cell;
        cell.frame = number + 1;
        node.style.setProperty("--step", (number / last).toFixed(3));
        if (typeof entry.confidence === "number") {
          // A negative confidence is minus an entropy h: exp(-h) is 1 where the model is certain, and near 0 where not.
          const value = this.lowest < 0 ? Math.exp(entry.confidence) : entry.confidence;
          node.style.setProperty("--confidence", Math.min(Math.max(value, 0), 1).toFixed(3));
          node.classList.add("measured");
        }
      }
    });
  }

  get hasConfidence() {
    return this.cells.some((cell) => typeof cell.entry?.confidence === "number");
  }

  /** Shows the canvas after a number of steps that wrote something; 0 is the canvas before the first step. */
  show(frame) {
    while (this.frame < frame) {
      for (const cell of this.frames[this.frame++].cells) this.write(cell);
    }
    while (this.frame > frame) {
      for (const cell of this.frames[--this.frame].cells) this.erase(cell);
    }
    this.refresh();
  }

  write(cell) {
    cell.written = true;
    const {node, entry} = cell;
    node.replaceChildren(...shown(entry.text));
    node.classList.remove("mask");
    node.classList.add("written", "new");
    node.classList.toggle("special", isSpecial(entry.text));
    this.label(cell);
  }

  erase(cell) {
    cell.written = false;
    cell.node.replaceChildren(MASK_SIGN);
    cell.node.classList.remove("written", "new", "special");
    cell.node.classList.add("mask");
    this.label(cell);
  }

  label(cell) {
    const state = cell.given || cell.written ? quoted(cell.entry.text) : say("masked");
    cell.node.setAttribute("aria-label", `${say("position", {position: cell.index + 1})}: ${state}`);
  }

  get playing() {
    return this.timer !== null;
  }

  /** Plays from the shown step, or from the beginning if the last step is shown. */
  play() {
    if (this.frame >= this.frames.length) this.show(0);
    this.tick();
  }

  tick() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      if (this.frame < this.frames.length) this.show(this.frame + 1);
      if (this.frame < this.frames.length) this.tick();
      else this.pause();
    }, 1000 / (STEPS_A_SECOND * Number(this.speed.value)));
    this.refresh();
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = null;
    this.refresh();
  }

  /** Follows the tokens that arrive. What arrives at once is shown within a second or two, step by step. */
  follow() {
    this.live = true;
    this.ending = null;
    const advance = () => {
      const behind = this.frames.length - this.frame;
      // Browsers delay the timers of pages that nobody sees.
      const all = stillness.matches || document.hidden;
      if (behind > 0) this.show(all ? this.frames.length : this.frame + Math.ceil(behind / 12));
      if (this.ending === null || this.frame < this.frames.length) {
        setTimeout(advance, 40);
        return;
      }
      this.live = false;
      this.refresh();
      this.ending();
    };
    advance();
  }

  /** Ends `follow`, because no more tokens will arrive. The promise is kept when the last step is shown. */
  finish() {
    return new Promise((resolve) => (this.ending = resolve));
  }

  choose(cell) {
    if (cell === null) return;
    this.cells[this.chosen].node.tabIndex = -1;
    this.cells[this.chosen].node.classList.remove("chosen");
    this.chosen = cell.index;
    cell.node.tabIndex = 0;
    cell.node.classList.add("chosen");
    this.describe(cell);
  }

  move(event) {
    const last = this.cells.length - 1;
    const target = {
      ArrowRight: this.chosen + 1, ArrowLeft: this.chosen - 1, ArrowDown: this.below(1), ArrowUp: this.below(-1),
      Home: 0, End: last,
    }[event.key];
    if (target === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.cells[Math.min(Math.max(target, 0), last)].node.focus();
  }

  /** Returns the index of the token that stands nearest in the next line below (1) or above (-1). */
  below(direction) {
    const from = this.cells[this.chosen].node.getBoundingClientRect();
    let found = this.chosen, top = null, distance = Infinity;
    for (let index = this.chosen + direction; this.cells[index] !== undefined; index += direction) {
      const box = this.cells[index].node.getBoundingClientRect();
      if (Math.abs(box.top - from.top) < from.height / 2) continue;
      if (top !== null && Math.abs(box.top - top) > from.height / 2) break;
      top ??= box.top;
      if (Math.abs(box.left - from.left) < distance) [found, distance] = [index, Math.abs(box.left - from.left)];
    }
    return found;
  }

  /** Says what is known about a token; `null` for none in particular. */
  describe(cell) {
    cell ??= this.canvas.contains(document.activeElement) ? this.cells[this.chosen] : null;
    if (cell === null) {
      this.about.replaceChildren(element("span", {}, say("hint")));
      return;
    }
    const facts = [say("position", {position: cell.index + 1})];
    const {entry} = cell;
    const nodes = [];
    if (cell.given) facts.push(say("given"));
    else if (!cell.written) facts.push(say("masked"));
    else {
      facts.push(say("atStep", {step: cell.frame}));
      if (typeof entry.confidence === "number") {
        facts.push(say(this.lowest < 0 ? "entropy" : "probability", {value: rounded(entry.confidence)}));
      }
      if (typeof entry.logprob === "number") facts.push(say("logprob", {value: rounded(Math.exp(entry.logprob))}));
    }
    if (cell.given || cell.written) {
      nodes.push(element("b", {}, quoted(entry.text)), " ");
      if (entry.text === "<|endoftext|>") facts.unshift(say("end"));
    }
    nodes.push(...facts.map((fact) => element("span", {}, fact)));
    if (cell.written && entry.runner_ups?.length) {
      const list = element("ol", {"aria-label": say("runnerUps")});
      for (const other of entry.runner_ups) {
        const bar = element("i", {"aria-hidden": "true"});
        bar.style.width = `${(100 * Math.exp(other.logprob)).toFixed(1)}%`;
        list.append(element("li", {}, element("b", {}, quoted(other.text)), rounded(Math.exp(other.logprob)), bar));
      }
      nodes.push(list);
    }
    this.about.replaceChildren(...nodes);
  }

  /** Brings the controls up to date. */
  refresh() {
    if (this.root === undefined) return;
    const confidence = this.colour.querySelector('[value="confidence"]');
    confidence.disabled = !this.hasConfidence;
    if (confidence.disabled && this.colour.value === "confidence") this.colour.value = "step";
    this.root.dataset.colour = this.colour.value;
    this.low.textContent = say(this.colour.value === "confidence" ? "unsure" : "early");
    this.high.textContent = say(this.colour.value === "confidence" ? "sure" : "late");
    this.button.textContent = say(this.playing ? "pause" : "play");
    this.button.disabled = this.live || this.frames.length === 0;
    this.slider.disabled = this.live || this.frames.length === 0;
    this.slider.max = this.frames.length;
    this.slider.value = this.frame;
    const written = this.cells.filter((cell) => cell.written || cell.given).length;
    const where = this.frame === 0 ? say("blank") : say("stepOf", {step: this.frame, steps: this.frames.length});
    this.output.textContent = where;
    this.slider.setAttribute("aria-valuetext", `${where}, ${say("writtenOf", {written, length: this.length})}`);
    this.canvas.setAttribute("aria-busy", String(this.live));
  }
}
