// Verdicts by key or button. The next row is here already when one is decided; what was said is sent behind it, and a row
// whose verdict could not be kept comes back. Other windows are asked every few seconds what they have said.

const desk = document.querySelector(".review");
const judges = document.querySelector("#judges");
const told = document.querySelector("#told");
const why = document.querySelector("#why");
const queue = desk.dataset.queue;
const verbs = { keep: "kept", relabel: "relabelled", drop: "dropped", skip: "cannot be told", undo: "taken back" };
const done = []; // rows decided here, the last one at the end
const sending = new Set();
let last = Number(desk.dataset.last);
let counted = last; // the entry up to which the page has counted
let fetching = false;
let exhausted = !judges.querySelector(".judge"); // the server has no other open place
let chosen = null; // a row to look at although it is decided

const articles = () => [...judges.querySelectorAll(".judge")];
const of = (row) => judges.querySelector(`.judge[data-row="${row}"]`);
const isOpen = (article) => article.dataset.action === "" && !sending.has(article.dataset.row);
const current = () => judges.querySelector(".judge:not([hidden])");

function say(text, care = false) {
  told.textContent = text;
  told.classList.toggle("care", care);
}

function button(name) {
  return document.querySelector(`.toolbar [data-do="${name}"]`);
}

function show(article) {
  for (const one of articles()) one.hidden = one !== article;
  const finished = document.querySelector(".finished");
  const toolbar = document.querySelector(".toolbar");
  finished.hidden = Boolean(article) || !exhausted || sending.size > 0;
  if (toolbar) toolbar.hidden = !article;
  if (!article) return;
  button("keep").querySelector("b").textContent = article.dataset.label;
  const relabel = button("relabel");
  const suggested = article.dataset.class;
  relabel.hidden = suggested === "" || suggested === article.dataset.labelClass;
  if (!relabel.hidden) relabel.querySelector("b").textContent = nameOf(suggested);
  for (const one of document.querySelectorAll(".others [data-class]")) {
    one.toggleAttribute("data-own", one.dataset.class === article.dataset.labelClass);
  }
}

function nameOf(number) {
  const one = document.querySelector(`.others [data-class="${number}"]`);
  return one ? one.dataset.name : document.querySelector(`#other option[value="${number}"]`)?.textContent ?? "";
}

function next() {
  const after = chosen === null ? null : of(chosen);
  chosen = null;
  const list = articles();
  const start = after ? list.indexOf(after) + 1 : 0;
  show([...list.slice(start), ...list.slice(0, start)].find(isOpen) ?? null);
  const left = list.filter(isOpen).length;
  if (left < 10 && !exhausted) more();
}

async function more() {
  if (fetching) return;
  fetching = true;
  let added = 0;
  try {
    const page = new DOMParser().parseFromString(await (await fetch(`/review?${queue}`)).text(), "text/html");
    for (const article of page.querySelectorAll("#judges .judge")) {
      if (!of(article.dataset.row)) {
        added += 1;
        article.hidden = true;
        judges.append(document.adoptNode(article));
      }
    }
    exhausted = added === 0 && sending.size === 0;
    if (!current()) show(articles().find(isOpen) ?? null);
  } catch {
    say("The explorer does not answer. Is it still running?", true);
  } finally {
    fetching = false;
  }
}

let sent = Promise.resolve();

function post(what) { // one after the other, so that the log has them in their order
  const answer = sent.then(() => send(what));
  sent = answer.catch(() => {});
  return answer;
}

async function send(what) {
  const body = JSON.stringify(what);
  const answer = await fetch(`/review/decide?${queue}`, { method: "POST", headers: { "Content-Type": "application/json" }, body });
  const found = await answer.json().catch(() => ({ error: `The explorer answers ${answer.status}.` }));
  if (!answer.ok) throw Object.assign(new Error(found.error), { status: answer.status });
  return found;
}

async function decide(action, number = null) {
  const article = current();
  if (!article || sending.has(article.dataset.row)) return;
  const row = article.dataset.row;
  if (action === "relabel" && String(number) === article.dataset.labelClass) action = "keep";
  const what = { row: Number(row), action, seen: Number(article.dataset.seen), why: why.value.trim() };
  if (action === "relabel") what.class = Number(number);
  const remark = why.value;
  why.value = "";
  sending.add(row);
  done.push(row);
  if (chosen === null) chosen = row;
  next();
  try {
    const found = await post(what);
    sending.delete(row);
    stands(article, found.verdict, found.kind);
    progress(found.progress, found.entry.number);
    line(found.entry, found.kind, article.dataset.label);
    last = Math.max(last, found.entry.number);
    say(`Row ${row}: ${verbs[action]}${action === "relabel" ? ` to ${found.entry.new}` : ""}. Saved.`);
    if (!current()) next();
  } catch (error) {
    sending.delete(row);
    done.splice(done.lastIndexOf(row), 1);
    why.value = remark;
    await look();
    chosen = row;
    show(article);
    say(error.message, true);
  }
}

async function undo() {
  const row = done.at(-1) ?? document.querySelector("#recent [data-undoable]")?.dataset.row;
  if (row === undefined) return say("Nothing was decided in this window yet.");
  const article = of(row);
  const seen = article ? article.dataset.seen : document.querySelector(`#recent [data-undoable][data-row="${row}"]`).dataset.seen;
  if (sending.has(row)) return setTimeout(undo, 30); // it is still on its way
  sending.add(row);
  try {
    const found = await post({ row: Number(row), action: "undo", seen: Number(seen), why: "" });
    sending.delete(row);
    if (done.includes(row)) done.splice(done.lastIndexOf(row), 1);
    progress(found.progress, found.entry.number);
    line(found.entry, found.kind, article?.dataset.label ?? "");
    last = Math.max(last, found.entry.number);
    if (!article) return location.reload();
    stands(article, found.verdict, found.kind);
    exhausted = false;
    chosen = row;
    show(article);
    say(`Row ${row}: taken back. Saved.`);
  } catch (error) {
    sending.delete(row);
    if (done.includes(row)) done.splice(done.lastIndexOf(row), 1);
    await look();
    say(error.message, true);
  }
}

function stands(article, verdict, kind) {
  article.dataset.action = verdict.action ?? "";
  article.dataset.seen = verdict.seen;
  const place = article.querySelector(".stands");
  place.hidden = !verdict.action;
  place.replaceChildren();
  if (!verdict.action) return;
  const what = document.createElement("b");
  what.textContent = verbs[verdict.action] + (verdict.action === "relabel" ? ` to ${verdict.label}` : "");
  place.append(what, ` by ${verdict.entry.who}${verdict.entry.why ? `: ${verdict.entry.why}` : ""} `);
  if (kind) place.append(note(`It was ${inWords(kind)}.`));
}

function inWords(kind) {
  if (kind.control) return kind.rank ? `drawn at random, and number ${kind.rank} of the suspicious` : "drawn at random";
  return kind.rank ? `number ${kind.rank} of the suspicious` : "not in this queue";
}

function note(text) {
  const one = document.createElement("span");
  one.className = "note was";
  one.textContent = text;
  return one;
}

function progress(found, number) {
  if (number < counted) return; // an answer that was overtaken
  counted = number;
  const place = document.querySelector("#progress");
  const bar = place.querySelector("progress");
  bar.max = found.places;
  bar.value = found.looked;
  const says = place.querySelector(".says");
  says.replaceChildren(...found.says.map((text) => Object.assign(document.createElement("li"), { textContent: text })));
}

function line(entry, kind, given) {
  const place = document.querySelector("#recent");
  let list = place.querySelector(".recent");
  if (!list) {
    list = Object.assign(document.createElement("ol"), { className: "recent" });
    place.replaceChildren(list);
  }
  for (const one of list.querySelectorAll(`[data-undoable][data-row="${entry.row}"]`)) one.removeAttribute("data-undoable");
  const item = document.createElement("li");
  const link = Object.assign(document.createElement("a"), { href: `/rows/${entry.row}`, textContent: `row ${entry.row}` });
  const what = document.createElement("b");
  what.textContent = verbs[entry.action] + (entry.action === "relabel" ? ` to ${entry.new}` : "");
  item.append(link, ` ${given} `, what);
  if (kind) item.append(note(inWords(kind)));
  item.dataset.row = entry.row;
  item.dataset.seen = entry.number;
  if (entry.action !== "undo") item.setAttribute("data-undoable", "");
  list.prepend(item);
  while (list.children.length > 8) list.lastElementChild.remove();
}

// ---- other windows ----------------------------------------------------------------------------------------------------

async function look() {
  try {
    const found = await (await fetch(`/review/log.json?${queue}&after=${last}`)).json();
    if (found.entries === undefined) return;
    for (const entry of found.entries) {
      if (entry.number <= last) continue;
      last = entry.number;
      const article = of(entry.row);
      line(entry, null, article?.dataset.label ?? "");
    }
    for (const verdict of found.verdicts) {
      const article = of(verdict.row);
      if (!article || sending.has(article.dataset.row) || Number(article.dataset.seen) >= verdict.seen) continue;
      stands(article, verdict, null);
      if (!verdict.action) exhausted = false;
      if (article === current()) {
        say(`Row ${verdict.row} was just ${verdict.action ? verbs[verdict.action] : "taken back"} in another window.`);
        if (verdict.action) next();
      }
    }
    if (found.entries.length) progress(found.progress, last);
    if (!current()) next();
  } catch {
    // the next look tells more
  }
}

addEventListener("beforeunload", (event) => {
  if (sending.size) event.preventDefault(); // what is on its way would be lost
});

setInterval(() => {
  if (document.visibilityState === "visible" && !sending.size) look();
}, 2500);

// ---- keys -------------------------------------------------------------------------------------------------------------

const keys = {
  k: () => decide("keep"),
  r: () => {
    const article = current();
    if (!article) return;
    if (!button("relabel").hidden) return decide("relabel", article.dataset.class);
    document.querySelector(".others button, .others select")?.focus();
    say("The model has no other label. Choose one.");
  },
  d: () => decide("drop"),
  s: () => decide("skip"),
  u: () => undo(),
  w: () => why?.focus(),
};

document.addEventListener(
  "keydown",
  (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target === why) {
      if (event.key === "Enter" || event.key === "Escape") why.blur();
      return;
    }
    if (event.target.closest?.("input, select, textarea, dialog")) return;
    const number = document.querySelector(`.others [data-key="${CSS.escape(event.key)}"]`);
    const act = number ? () => decide("relabel", number.dataset.class) : keys[event.key];
    if (!act || !document.querySelector(".toolbar")) return;
    event.preventDefault();
    act();
  },
  true,
);

document.querySelector(".toolbar")?.addEventListener("click", (event) => {
  const one = event.target.closest("button");
  if (!one) return;
  if (one.dataset.class !== undefined && !one.dataset.do) return decide("relabel", one.dataset.class);
  const acts = { relabel: keys.r, undo, other: () => decide("relabel", document.querySelector("#other").value) };
  (acts[one.dataset.do] ?? (() => decide(one.dataset.do)))();
});

for (const one of document.querySelectorAll(".toolbar :disabled")) one.disabled = false;
const first = articles()[0];
if (first && first.dataset.action !== "") chosen = first.dataset.row;
if (first) show(first);
