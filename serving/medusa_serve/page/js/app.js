/** Puts the page together. */

import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { bindSettings, makeKeyDialog } from "./dialogs.js";
import { byId } from "./dom.js";
import { ApiError, describe } from "./errors.js";
import { followEnd } from "./follow.js";
import { drawLegend } from "./legend.js";
import { makeRenderer } from "./markdown.js";
import { Panel } from "./panel.js";
import { Settings } from "./settings.js";

const USUAL_HEADS = 4; // in the legend, until the server has said how many there are

function start() {
  const settings = new Settings();
  const api = new Api(settings);
  const panel = new Panel();
  const askForKey = makeKeyDialog(settings);
  const modelId = makeModelLoader(api);
  const chat = new Chat({
    list: byId("turns"),
    api,
    settings,
    panel,
    render: makeRenderer(),
    modelId,
    askForKey,
    follow: followEnd(byId("main"), byId("turns")),
    announce: (text) => {
      byId("announcer").textContent = text;
    },
    onRunning: (isRunning) => {
      byId("send").hidden = isRunning;
      byId("stop").hidden = !isRunning;
    },
  });
  drawLegend(byId("legend"), USUAL_HEADS);
  bindSettings(settings);
  bindView(settings, chat);
  bindComposer(settings, chat);
  bindPanel(panel);
  greet(modelId, askForKey);
}

/** Ask for the model's name until the server has told it once. */
function makeModelLoader(api) {
  let known = null;
  return async () => {
    if (known) return known;
    const model = await api.model();
    known = model.id;
    const numHeads = model.medusa?.num_heads ?? USUAL_HEADS;
    byId("model").textContent = `${model.id} · ${numHeads} ${numHeads === 1 ? "head" : "heads"}`;
    drawLegend(byId("legend"), numHeads);
    return known;
  };
}

/** Show the model's name when the page opens; an error here is told again when a question is sent. */
async function greet(modelId, askForKey) {
  try {
    await modelId();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401 && (await askForKey())) greet(modelId, askForKey);
    else byId("model").textContent = describe(error);
  }
}

function bindView(settings, chat) {
  for (const choice of document.querySelectorAll("input[name=view]")) {
    choice.checked = choice.value === settings.view;
    choice.addEventListener("change", () => {
      settings.change({ view: choice.value });
      byId("legend").hidden = settings.view !== "tokens";
      chat.changeView(settings.view);
    });
  }
  byId("legend").hidden = settings.view !== "tokens";
}

function bindComposer(settings, chat) {
  const question = byId("question");
  const compare = byId("compare");
  const send = async (text) => {
    if (!text.trim() || chat.isRunning) return;
    byId("welcome").hidden = true;
    question.value = "";
    await chat.send(text.trim());
  };
  compare.checked = settings.compare;
  compare.addEventListener("change", () => settings.change({ compare: compare.checked }));
  byId("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(question.value);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send(question.value);
  });
  for (const example of document.querySelectorAll("[data-question]"))
    example.addEventListener("click", () => {
      question.focus();
      send(example.textContent);
    });
  byId("stop").addEventListener("click", () => {
    chat.stop();
    question.focus();
  });
  byId("clear").addEventListener("click", () => {
    chat.clear();
    byId("welcome").hidden = false;
    question.focus();
  });
}

function bindPanel(panel) {
  const explain = byId("explain");
  explain.addEventListener("click", () => {
    panel.explain(explain);
    byId("panel-title").focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) panel.close();
  });
  if (window.matchMedia("(min-width: 75rem)").matches) panel.explain();
}

start();
