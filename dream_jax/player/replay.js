"use strict";
// Shows the record of a replay file.

Object.assign(WORDS.en, {
  title: "An answer, as it was denoised",
  prompt: "Prompt",
  canvasTitle: "Canvas",
  text: "Text at the end",
  settings: "Settings",
  facts: "{model} · tokens: {length} · forward passes: {forwards}",
});
Object.assign(WORDS.zh, {
  title: "一个回答的去噪过程",
  prompt: "提示",
  canvasTitle: "画布",
  text: "最终文本",
  settings: "设置",
  facts: "{model} · 词元数：{length} · 前向计算次数：{forwards}",
});

const record = JSON.parse(document.getElementById("record").textContent);
const player = new Player(record);

function describeRecord() {
  const {model, forwards} = record;
  document.getElementById("facts").textContent = say("facts", {model, length: player.length, forwards});
  document.title = `${say("title")}: ${model}`;
}

document.getElementById("player").append(player.root);
document.getElementById("asked").hidden = record.prompt === "";
document.getElementById("prompt").textContent = record.prompt;
document.getElementById("text").textContent = record.text;
for (const [name, value] of Object.entries(record.settings)) {
  document.getElementById("settings").append(element("dt", {}, name), element("dd", {}, String(value)));
}
offerLanguages(document.getElementById("language"));
document.addEventListener("languagechosen", describeRecord);
setLanguage(language);
if (!stillness.matches) player.play();
