"use strict";
// The page of the server: a chat whose canvas is shown while it is denoised, and an editor for texts with gaps.

Object.assign(WORDS.en, {
  mode: "What to do",
  chat: "Chat",
  infill: "Infill",
  welcome: "Ask something, and watch the answer appear out of noise.",
  welcomeRaw: "This model continues texts. Write a beginning, and watch the rest appear out of noise.",
  question: "Message",
  sendHint: "Enter sends, Shift+Enter begins a new line, Escape stops.",
  sendHintRaw: "Ctrl+Enter sends, Escape stops.",
  send: "Send",
  stop: "Stop",
  clear: "New chat",
  settings: "Settings",
  preset: "Preset",
  maxTokens: "New tokens",
  temperature: "Temperature",
  topP: "Top-p",
  seed: "Seed",
  seedHint: "random",
  runnerUpCount: "Runner-up tokens",
  system: "System prompt",
  stopStrings: "Stop at these texts, one a line",
  newline: "End the prompt with a line break",
  changeKey: "API key …",
  keyTitle: "API key",
  keyHelp: "This server answers only with a key. It is kept until the page is closed or loaded again.",
  key: "Key",
  cancel: "Cancel",
  useKey: "Use",
  infillHelp: "Write a text. Set the cursor where words are missing and insert a gap there.",
  addGap: "Insert gap",
  fill: "Fill in",
  textPart: "Text {number}",
  gapKind: "Kind of the gap",
  gapLength: "Number of tokens",
  exactly: "exactly",
  upTo: "up to",
  tokens: "tokens",
  remove: "Remove",
  needsGap: "There is no gap yet: insert one first.",
  needsNumber: "{field}: {value} is not possible here; {remedy}",
  between: "use a number from {low} to {high}",
  wholeNumber: "use a whole number",
  working: "Denoising.",
  stopped: "Stopped.",
  done: "{text} – tokens: {count}, forward passes: {forwards}.",
  how: "How it was written",
  facts: "tokens: {count} · forward passes: {forwards} · seed: {seed} · {seconds} s",
  copy: "Copy",
  copied: "Copied",
  unreachable: "The server cannot be reached. Is it running? ({reason})",
  broken: "The connection ended before the answer was complete.",
  unreadable: "The server sent something that is not an answer (status {status}).",
  retry: "Try again in {seconds} s.",
  exampleSudoku: "A 4×4 sudoku (the demo model)",
  exampleSky: "Why is the sky blue?",
  exampleHaiku: "Write a haiku about gradient descent.",
  onceUpon: "Once upon a time there was",
  whoLived: "who lived by the sea.",
});
Object.assign(WORDS.zh, {
  mode: "做什么",
  chat: "对话",
  infill: "填空",
  welcome: "提一个问题，看答案从噪声中浮现。",
  welcomeRaw: "这个模型续写文本。写一个开头，看其余部分从噪声中浮现。",
  question: "消息",
  sendHint: "Enter 发送，Shift+Enter 换行，Esc 停止。",
  sendHintRaw: "Ctrl+Enter 发送，Esc 停止。",
  send: "发送",
  stop: "停止",
  clear: "新对话",
  settings: "设置",
  preset: "预设",
  maxTokens: "新词元数",
  temperature: "温度",
  topP: "Top-p",
  seed: "随机种子",
  seedHint: "随机",
  runnerUpCount: "候选词元数",
  system: "系统提示",
  stopStrings: "遇到这些文本时停止，每行一个",
  newline: "提示以换行结尾",
  changeKey: "API 密钥…",
  keyTitle: "API 密钥",
  keyHelp: "此服务器需要密钥。密钥保留到页面关闭或重新载入为止。",
  key: "密钥",
  cancel: "取消",
  useKey: "使用",
  infillHelp: "写一段文本，把光标放在缺词的位置，在那里插入空位。",
  addGap: "插入空位",
  fill: "填写",
  textPart: "文本 {number}",
  gapKind: "空位类型",
  gapLength: "词元数",
  exactly: "正好",
  upTo: "最多",
  tokens: "个词元",
  remove: "删除",
  needsGap: "还没有空位：请先插入一个。",
  needsNumber: "{field}：{value} 在此无效；{remedy}",
  between: "请用 {low} 到 {high} 之间的数",
  wholeNumber: "请用整数",
  working: "正在去噪。",
  stopped: "已停止。",
  done: "{text} – 词元数：{count}，前向计算次数：{forwards}。",
  how: "写入过程",
  facts: "词元数：{count} · 前向计算次数：{forwards} · 种子：{seed} · {seconds} 秒",
  copy: "复制",
  copied: "已复制",
  unreachable: "无法连接服务器。它在运行吗？（{reason}）",
  broken: "连接在回答完成之前中断。",
  unreadable: "服务器返回的不是回答（状态 {status}）。",
  retry: "请在 {seconds} 秒后重试。",
  exampleSudoku: "一个 4×4 数独（演示模型）",
  exampleSky: "天空为什么是蓝色的？",
  exampleHaiku: "写一首关于梯度下降的俳句。",
  onceUpon: "从前有一个",
  whoLived: "住在海边。",
});

const byId = (id) => document.getElementById(id);
const state = {model: null, key: "", messages: [], abort: null};

/** Says something to people who use a screen reader. Only the beginning and the end of an answer are said. */
function announce(text) {
  byId("live").textContent = text;
}

function showFailure(text) {
  byId("failure").textContent = text;
  byId("failure").hidden = text === "";
}

// Requests

/** An error with words for the person. */
class Refusal extends Error {}

/** Asks for the key. Returns whether one was given. */
function askForKey() {
  const dialog = byId("key-dialog");
  return new Promise((resolve) => {
    const close = (used) => {
      if (used) state.key = byId("key").value.trim();
      byId("key").value = "";
      dialog.close();
      resolve(used);
    };
    byId("key-form").onsubmit = (event) => {
      event.preventDefault();
      close(true);
    };
    byId("key-cancel").onclick = () => close(false);
    dialog.oncancel = (event) => {
      event.preventDefault();
      close(false);
    };
    dialog.showModal();
    byId("key").focus();
  });
}

/** Calls the server, and asks for a key where it wants one. Returns the response; throws a Refusal for an error. */
async function call(path, options = {}) {
  for (;;) {
    const headers = {...options.headers};
    if (state.key) headers.Authorization = `Bearer ${state.key}`;
    let response;
    try {
      response = await fetch(path, {...options, headers, cache: "no-store", credentials: "omit"});
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal(say("unreachable", {reason: error.message}));
    }
    if (response.ok) return response;
    let message = say("unreadable", {status: response.status});
    try {
      message = (await response.json()).error.message;
    } catch (error) {
      if (error.name === "AbortError") throw error;
    }
    if (response.status === 401 && (await askForKey())) continue;
    const wait = response.headers.get("Retry-After");
    throw new Refusal(wait ? `${message} ${say("retry", {seconds: wait})}` : message);
  }
}

/** Yields the objects of a stream of server-sent events, up to [DONE]. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal(say("broken"));
    }
    if (chunk.done) throw new Refusal(say("broken"));
    buffer += chunk.value.replaceAll("\r", "");
    const blocks = buffer.split("\n\n");
    buffer = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      if (data === "[DONE]") return;
      if (data === "") continue; // a comment, which keeps the connection alive
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(event.error.message);
      yield event;
    }
  }
}

// Settings

/** Returns the number in a field, or undefined if it is empty. Throws a Refusal if it cannot be used. */
function numberIn(id, key) {
  const input = byId(id);
  if (input.value === "" && !input.validity.badInput) return undefined;
  if (!input.validity.badInput && input.validity.valid) return Number(input.value);
  const {rangeUnderflow, rangeOverflow} = input.validity;
  if (!rangeUnderflow && !rangeOverflow && !input.validity.badInput && input.step !== "1") return Number(input.value);
  const high = input.max || "…";
  const remedy = rangeUnderflow || rangeOverflow ? say("between", {low: input.min, high}) : say("wholeNumber");
  byId("settings").open = true;
  input.focus();
  throw new Refusal(say("needsNumber", {field: say(key), value: input.value, remedy}));
}

/** Returns the fields that all requests have. */
function commonFields() {
  const body = {
    model: state.model.id,
    temperature: numberIn("temperature", "temperature"),
    top_p: numberIn("top-p", "topP"),
    seed: numberIn("seed", "seed"),
    stream: true,
    stream_options: {include_usage: true},
    dream: {preset: byId("preset").value, denoise: true},
  };
  const runnerUps = numberIn("runner-ups", "runnerUpCount");
  if (runnerUps) body.dream.runner_ups = runnerUps;
  return body;
}

const isRaw = () => state.model !== null && state.model.dream.template === "raw";

// Answers

/** An answer on the page while it is made. */
class Answer {
  constructor(parent) {
    this.parent = parent;
    this.text = "";
    this.positions = [0];
    this.begun = performance.now();
    this.root = element("div", {class: "answer"});
    parent.append(this.root);
  }

  /** Takes one event of the stream. `parts` are the texts and gaps of an infilling. */
  take(event, parts) {
    const {dream, choices, usage} = event;
    if (usage) this.usage = usage;
    if (dream?.event === "canvas") this.open(dream, parts);
    else if (dream?.event === "written") this.player?.add(dream.tokens.map((one) => this.flat(one)));
    if (dream && "seed" in dream) this.seed = dream.seed;
    if (dream && "forwards" in dream) this.forwards = dream.forwards;
    for (const choice of choices ?? []) this.text += choice.delta?.content ?? choice.text ?? "";
  }

  open(canvas, parts) {
    const lengths = canvas.gaps?.map((gap) => gap.length) ?? [canvas.length];
    for (const length of lengths) this.positions.push(this.positions.at(-1) + length);
    const gaps = lengths.map((length) => ({length}));
    const pieces = parts ? parts.map((part) => (typeof part === "string" ? part : gaps.shift())) : gaps;
    this.player = new Player({parts: pieces, forced: canvas.forced.map((one) => this.flat(one)), tokens: []});
    this.root.append(this.player.root);
    this.player.follow();
  }

  /** Returns a token whose position counts over all gaps. */
  flat(token) {
    return {...token, position: this.positions[token.gap ?? 0] + token.position};
  }

  /** Shows the text and what is known about it, when the answer is complete or has been stopped. */
  async close(failure) {
    await this.player?.finish();
    const seconds = ((performance.now() - this.begun) / 1000).toFixed(1);
    const nodes = [];
    if (this.text) nodes.push(element("pre", {class: "text"}, this.text));
    if (failure) nodes.push(element("p", {class: "error"}, failure));
    if (this.player) {
      const how = element("details", {class: "how", open: true}, element("summary", {"data-say": "how"}));
      how.append(this.player.root);
      nodes.push(how);
    }
    if (this.usage) {
      const facts = element("span", {class: "soft facts"});
      const values = {count: this.usage.completion_tokens, forwards: this.forwards, seed: this.seed, seconds};
      const write = () => (facts.textContent = say("facts", values));
      document.addEventListener("languagechosen", write);
      write();
      const copy = element("button", {type: "button", "data-say": "copy"});
      copy.addEventListener("click", async () => {
        await navigator.clipboard.writeText(this.text);
        copy.textContent = say("copied");
      });
      // Browsers offer the clipboard only to pages that came over TLS or from this machine.
      nodes.push(element("div", {class: "row"}, facts, ...(navigator.clipboard ? [copy] : [])));
    }
    this.root.replaceChildren(...nodes);
    translate(this.root);
  }
}

/** Sends a request and shows its answer. Returns the answer, or null if it was refused or stopped without a text. */
async function answer(path, body, parent, parts) {
  showFailure("");
  const shownAnswer = new Answer(parent);
  const abort = (state.abort = new AbortController());
  setBusy(true);
  announce(say("working"));
  let failure = "";
  try {
    try {
      const response = await call(path, {
        method: "POST",
        headers: {"Content-Type": "application/json"},
        body: JSON.stringify(body),
        signal: abort.signal,
      });
      for await (const event of eventsOf(response)) {
        shownAnswer.take(event, parts);
        keepInView(shownAnswer.root);
      }
    } catch (error) {
      if (error.name !== "AbortError" && !(error instanceof Refusal)) throw error;
      failure = error.name === "AbortError" ? say("stopped") : error.message;
    }
    await shownAnswer.close(failure);
  } finally {
    state.abort = null;
    setBusy(false);
  }
  keepInView(shownAnswer.root);
  const {text, usage, forwards} = shownAnswer;
  announce(failure || say("done", {text, count: usage?.completion_tokens ?? "?", forwards}));
  return text || !failure ? shownAnswer : null;
}

function keepInView(node) {
  const below = node.getBoundingClientRect().bottom - innerHeight;
  // Whoever has scrolled away from the end wants to stay there.
  if (below < 300) node.scrollIntoView({block: "nearest"});
}

function setBusy(busy) {
  for (const id of ["send", "fill", "clear"]) byId(id).disabled = busy;
  for (const id of ["stop", "stop-infill"]) byId(id).disabled = !busy;
}

function stop() {
  state.abort?.abort();
}

// Chat

async function send() {
  const question = byId("question");
  if (state.model === null || state.abort !== null || question.value.trim() === "") return;
  const raw = isRaw();
  let body, text = question.value;
  try {
    const stops = byId("stop-strings").value.split("\n").filter((line) => line !== "");
    body = {...commonFields(), max_tokens: numberIn("max-tokens", "maxTokens")};
    if (stops.length) body.stop = stops;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    showFailure(error.message);
    return;
  }
  const asked = {role: "user", content: text};
  if (raw) {
    if (byId("newline").checked && !text.endsWith("\n")) text += "\n";
    body.prompt = text;
  } else {
    const system = byId("system").value;
    body.messages = [...(system ? [{role: "system", content: system}] : []), ...state.messages, asked];
  }
  byId("welcome").hidden = true;
  for (const old of byId("turns").querySelectorAll(".how")) old.open = false;
  const turn = element("article", {class: raw ? "turn raw" : "turn"});
  turn.append(element("div", {class: "asked"}, element("pre", {}, text)));
  byId("turns").append(turn);
  question.value = "";
  const found = await answer(raw ? "v1/completions" : "v1/chat/completions", body, turn);
  if (found !== null) {
    state.messages.push(asked);
    // An empty turn is nothing that a model is trained on, so the conversation goes on without it, as in sample.py.
    if (found.text.trim()) state.messages.push({role: "assistant", content: found.text});
  } else if (question.value === "") {
    question.value = asked.content; // so that nothing has to be typed again
  }
  question.focus();
}

function clearChat() {
  state.messages = [];
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  byId("question").focus();
}

// Infilling

const pieces = [];
let cursor = null; // the text in which the cursor stands or stood last

function newText(text) {
  const area = element("textarea", {rows: "2", spellcheck: "false"});
  area.value = text;
  area.addEventListener("focus", () => (cursor = area));
  return {kind: "text", node: area, area};
}

function newGap(length, kind) {
  const number = element("input", {type: "number", min: "1", step: "1", value: length, "data-say-label": "gapLength"});
  const select = element(
    "select", {"data-say-label": "gapKind"},
    element("option", {value: "length", "data-say": "exactly"}), element("option", {value: "up_to", "data-say": "upTo"}),
  );
  select.value = kind;
  const remove = element("button", {type: "button", "data-say": "remove"});
  const node = element("div", {class: "gap"}, select, number, element("span", {"data-say": "tokens"}));
  node.append(element("span", {class: "spring"}), remove);
  const gap = {kind: "gap", node, number, select};
  remove.addEventListener("click", () => removeGap(gap));
  return gap;
}

function drawPieces() {
  byId("parts").replaceChildren(...pieces.map((piece) => piece.node));
  let number = 0;
  for (const piece of pieces) {
    if (piece.kind === "text") piece.area.setAttribute("aria-label", say("textPart", {number: ++number}));
  }
  translate(byId("parts"));
}

function addGap() {
  const texts = pieces.filter((piece) => piece.kind === "text");
  const piece = texts.find((one) => one.area === cursor) ?? texts.at(-1);
  const {selectionStart, selectionEnd, value} = piece.area;
  const gap = newGap(8, "length");
  const after = newText(value.slice(selectionEnd));
  piece.area.value = value.slice(0, selectionStart); // a selection becomes the gap
  pieces.splice(pieces.indexOf(piece) + 1, 0, gap, after);
  drawPieces();
  gap.number.focus();
  gap.number.select();
}

/** Removes a gap; the texts on both sides become one. */
function removeGap(gap) {
  const index = pieces.indexOf(gap);
  const [before, after] = [pieces[index - 1], pieces[index + 1]];
  const end = before.area.value.length;
  before.area.value += after.area.value;
  pieces.splice(index, 2);
  drawPieces();
  before.area.focus();
  before.area.setSelectionRange(end, end);
}

async function fill() {
  if (state.model === null || state.abort !== null) return;
  const parts = [];
  let body;
  try {
    for (const piece of pieces) {
      if (piece.kind === "text") {
        if (piece.area.value) parts.push(piece.area.value);
        continue;
      }
      const length = Number(piece.number.value);
      if (!Number.isInteger(length) || length < 1) {
        piece.number.focus();
        const remedy = say("between", {low: 1, high: state.model.dream.max_length});
        throw new Refusal(say("needsNumber", {field: say("gapLength"), value: piece.number.value, remedy}));
      }
      parts.push({[piece.select.value]: length});
    }
    if (parts.every((part) => typeof part === "string")) throw new Refusal(say("needsGap"));
    body = {...commonFields(), parts};
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    showFailure(error.message);
    return;
  }
  for (const old of byId("filled").querySelectorAll(".how")) old.open = false;
  const turn = element("article", {class: "turn raw"});
  byId("filled").prepend(turn);
  await answer("v1/infill", body, turn, parts);
}

// The page

function selectTab(name) {
  document.body.dataset.tab = name;
  for (const one of ["chat", "infill"]) {
    byId(one).hidden = one !== name;
    byId(`tab-${one}`).setAttribute("aria-selected", String(one === name));
    byId(`tab-${one}`).tabIndex = one === name ? 0 : -1;
  }
}

function offerExamples() {
  const offers = isRaw() ? [["exampleSudoku", "4000\n0124\n2031\n0000\n"]] : [["exampleSky"], ["exampleHaiku"]];
  const buttons = offers.map(([key, text]) => {
    const button = element("button", {type: "button", "data-say": key});
    button.addEventListener("click", () => {
      byId("question").value = text ?? say(key);
      byId("question").focus();
    });
    return button;
  });
  byId("examples").replaceChildren(...buttons);
  translate(byId("examples"));
}

function describePage() {
  byId("send-hint").textContent = say(isRaw() ? "sendHintRaw" : "sendHint");
  byId("welcome").firstElementChild.dataset.say = isRaw() ? "welcomeRaw" : "welcome";
  translate(byId("welcome"));
  if (pieces.length) drawPieces();
}

async function begin() {
  offerLanguages(byId("language"));
  document.addEventListener("languagechosen", describePage);
  pieces.push(newText(`${say("onceUpon")} `), newGap(8, "length"), newText(` ${say("whoLived")}`));
  setLanguage(language);
  for (const name of ["chat", "infill"]) {
    byId(`tab-${name}`).addEventListener("click", () => selectTab(name));
    byId(`tab-${name}`).addEventListener("keydown", (event) => {
      if (event.key !== "ArrowRight" && event.key !== "ArrowLeft") return;
      const other = name === "chat" ? "infill" : "chat";
      selectTab(other);
      byId(`tab-${other}`).focus();
    });
  }
  byId("send").addEventListener("click", send);
  byId("clear").addEventListener("click", clearChat);
  byId("fill").addEventListener("click", fill);
  byId("add-gap").addEventListener("click", addGap);
  byId("stop").addEventListener("click", stop);
  byId("stop-infill").addEventListener("click", stop);
  byId("change-key").addEventListener("click", askForKey);
  byId("question").addEventListener("keydown", (event) => {
    // isComposing: Enter chooses a word of an input method there.
    if (event.key !== "Enter" || event.isComposing || event.shiftKey) return;
    if (isRaw() && !event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !byId("key-dialog").open) stop();
  });
  byId("settings").open = matchMedia("(min-width: 60rem)").matches;
  try {
    const response = await call("v1/models");
    state.model = (await response.json()).data[0];
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    showFailure(error.message);
    return;
  }
  const {dream} = state.model;
  byId("model").textContent = state.model.id;
  document.title = `${state.model.id} · dream_jax`;
  byId("preset").append(...dream.presets.map((name) => element("option", {value: name}, name)));
  byId("preset").value = dream.preset;
  byId("max-tokens").value = dream.max_tokens;
  byId("max-tokens").max = dream.max_length;
  byId("newline-field").hidden = !isRaw();
  byId("system").closest("label").hidden = isRaw();
  byId("clear").hidden = isRaw();
  offerExamples();
  describePage();
  // On a telephone, the focus would open the keyboard over the page.
  if (matchMedia("(pointer: fine)").matches) byId("question").focus();
}

begin();
