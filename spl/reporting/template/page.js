"use strict";
// What the page does: draws its figures, chooses among them, shows samples side by side, sorts and saves the table.
// Texts are set as textContent, never as HTML.

const PER_PAGE = 3;
const MOST_ROWS = 300;
const views = [];
let data;

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

const byId = (id) => document.getElementById(id);
const colourOf = (policy) => data.colours[policy] ?? "var(--soft)";

function swatch(policy) {
  const made = element("span", { className: "swatch" });
  made.style.background = colourOf(policy);
  return made;
}

async function unpack() {
  const letters = atob(byId("data").textContent);
  const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// ---- figures

const shown = () => [...document.querySelectorAll("#policies [aria-pressed=true]")].map((chip) => chip.value);

function legend() {
  for (const policy of Object.keys(data.colours)) {
    const chip = element("button", { type: "button", className: "chip", value: policy }, swatch(policy), policy);
    chip.ariaPressed = "true";
    chip.title = "click: draw or leave out; double click: this one alone";
    chip.onclick = () => { chip.ariaPressed = String(chip.ariaPressed !== "true"); redraw(); };
    chip.ondblclick = () => { only(policy); redraw(); };
    byId("policies").append(chip);
  }
}

function only(policy) {
  const chips = [...document.querySelectorAll("#policies .chip")];
  const alone = chips.every((chip) => (chip.value === policy) === (chip.ariaPressed === "true"));
  for (const chip of chips) chip.ariaPressed = String(alone || chip.value === policy);
}

function redraw() {
  for (const view of views) view.signal("shown", shown()).runAsync();
}

async function draw(place, panel, name) {
  const { title, ...spec } = panel.spec;
  const target = element("div");
  const lines = panel.lines.map((textContent) => element("p", { className: "line", textContent }));
  place.replaceChildren(...(title ? [element("h4", { textContent: title })] : []), target, ...lines);
  spec.params = [{ name: "shown", value: shown() }];
  const actions = { export: true, source: false, compiled: false, editor: false };
  const options = { renderer: "svg", ast: true, actions, config: data.config, tooltip: tip, downloadFileName: name };
  const { view } = await vegaEmbed(target, spec, options);
  views.push(view);
  return view;
}

async function figure(place) {
  const name = place.dataset.figure;
  const { choosers, panels } = data.figures[name];
  const into = place.querySelector(".panels");
  if (!choosers.length) {
    for (const panel of panels) {
      const slot = element("div");
      into.append(slot);
      await draw(slot, panel, name);
    }
    return;
  }
  place.classList.add("chosen");
  const slot = element("div");
  into.append(slot);
  const selects = choosers.map((title, k) => {
    const select = element("select");
    const names = [...new Set(panels.map((panel) => panel.keys[k]))];
    select.append(...names.map((value) => element("option", { value, textContent: value })));
    place.querySelector(".choosers").append(element("label", {}, title, select));
    return select;
  });
  let view = null;
  const redrawn = async () => {
    const panel = panels.find(({ keys }) => keys.every((key, k) => key === selects[k].value));
    if (view) views.splice(views.indexOf(view), 1)[0].finalize();
    view = panel ? await draw(slot, panel, name) : null;
    if (!panel) slot.replaceChildren(element("p", { className: "none", textContent: "These two were not measured together." }));
  };
  // One after the other: a choice may come before the chart of the one before it is drawn.
  let drawing = redrawn();
  for (const select of selects) select.onchange = () => (drawing = drawing.then(redrawn, redrawn));
  await drawing;
}

function tip(handler, event, item, value) {
  const box = byId("tip");
  box.hidden = value === null || value === undefined || value === "";
  if (box.hidden) return;
  const list = element("dl");
  for (const [name, text] of Object.entries(value)) {
    if (text !== "") list.append(element("dt", { textContent: name }), element("dd", { textContent: text }));
  }
  box.replaceChildren(list, ...examples(value.policy, value.setting));
  const { offsetWidth: width, offsetHeight: height } = box;
  box.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
  box.style.top = `${event.clientY + 14 + height > innerHeight ? Math.max(4, event.clientY - height - 10) : event.clientY + 14}px`;
}

function examples(policy, setting) {
  const { columns, replies } = data.browser;
  const column = columns.findIndex((each) => each.policy === policy && each.setting === setting);
  const found = column < 0 ? [] : (replies[column][prompt.at] ?? []);
  return found.slice(0, 2).map(([text]) => element("p", { textContent: text }));
}

// ---- samples

const prompt = { at: 0, page: 0, columns: [] };

function browser() {
  const { prompts, columns } = data.browser;
  if (!prompts.length) return;
  prompt.columns = firstColumns(columns);
  listPrompts("");
  columns.forEach((column, k) => {
    const chip = element("button", { type: "button", className: "chip" }, swatch(column.policy), column.label);
    chip.ariaPressed = String(prompt.columns.includes(k));
    chip.onclick = () => {
      const on = prompt.columns.includes(k);
      prompt.columns = on ? prompt.columns.filter((each) => each !== k) : [...prompt.columns, k].sort((a, b) => a - b);
      chip.ariaPressed = String(!on);
      browse();
    };
    byId("columns").append(chip);
  });
  byId("prompt").onchange = (event) => goTo(Number(event.target.value));
  byId("prompt-search").oninput = (event) => listPrompts(event.target.value);
  byId("prompt-back").onclick = () => step(-1);
  byId("prompt-on").onclick = () => step(1);
  byId("page-back").onclick = () => turn(-1);
  byId("page-on").onclick = () => turn(1);
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { ArrowLeft: () => turn(-1), ArrowRight: () => turn(1), k: () => step(-1), j: () => step(1) };
    if (keys[event.key]) { keys[event.key](); event.preventDefault(); }
  });
  browse();
}

// The first column of each policy; of more than three policies the first two, which are base and DPO, and the last.
function firstColumns(columns) {
  const firsts = [...columns.keys()].filter((k) => columns.findIndex(({ policy }) => policy === columns[k].policy) === k);
  return firsts.length <= 3 ? firsts : [firsts[0], firsts[1], firsts[firsts.length - 1]];
}

const lastOf = (messages) => messages.length ? messages[messages.length - 1].content : "";

function listPrompts(words) {
  const found = [...data.browser.prompts.entries()].filter(([, { item, messages }]) =>
    words.toLowerCase().split(/\s+/).every((word) => `${item} ${lastOf(messages)}`.toLowerCase().includes(word)));
  byId("prompt").replaceChildren(...found.map(([k, { item, messages }]) =>
    element("option", { value: k, textContent: `${item}: ${lastOf(messages).slice(0, 140)}` })));
  if (found.length && !found.some(([k]) => k === prompt.at)) goTo(found[0][0]);
  byId("prompt").value = prompt.at;
}

function goTo(k) {
  Object.assign(prompt, { at: k, page: 0 });
  browse();
}

function step(by) {
  const listed = [...byId("prompt").options].map(({ value }) => Number(value));
  const next = listed[listed.indexOf(prompt.at) + by];
  if (next !== undefined) { byId("prompt").value = next; goTo(next); }
}

const longest = () => Math.max(0, ...prompt.columns.map((k) => (data.browser.replies[k][prompt.at] ?? []).length));

function turn(by) {
  const next = prompt.page + by;
  if (next >= 0 && next * PER_PAGE < longest()) { prompt.page = next; browse(); }
}

function browse() {
  const { prompts, columns, replies } = data.browser;
  const first = prompt.page * PER_PAGE, total = longest();
  byId("conversation").replaceChildren(...prompts[prompt.at].messages.flatMap(({ role, content }) =>
    [element("div", { className: "role", textContent: role }), element("p", { textContent: content })]));
  byId("page").textContent = total ? `replies ${first + 1} to ${Math.min(first + PER_PAGE, total)} of ${total}` : "no replies";
  byId("replies").replaceChildren(...prompt.columns.map((k) => column(columns[k], replies[k][prompt.at] ?? [], first)));
}

function column({ policy, label }, given, first) {
  const tokens = given.filter(([, num]) => num !== null).map(([, num]) => num);
  const mean = tokens.length ? `${(tokens.reduce((a, b) => a + b, 0) / tokens.length).toFixed(0)} tokens on average` : "";
  const head = element("h3", {}, swatch(policy), label, element("span", { className: "small", textContent: mean }));
  head.style.borderColor = colourOf(policy);
  const cards = given.slice(first, first + PER_PAGE).map((reply, k) => card(reply, first + k));
  const none = element("p", { className: "none", textContent: "no further reply to this prompt" });
  return element("div", { className: "column" }, head, ...(cards.length ? cards : [none]));
}

function card([text, tokens, finish, logp], index) {
  const about = element("span", { className: "small", textContent: [`${index + 1}`, tokens === null ? "" : `${tokens} tokens`,
    logp === null ? "" : `log-probability ${logp.toFixed(1)}`].filter(Boolean).join(" · ") });
  if (finish === "length") about.append(element("span", { className: "cut", textContent: " · cut" }));
  const said = text ? { textContent: text } : { className: "none", textContent: "nothing" };
  return element("div", { className: "reply" }, about, element("p", said));
}

// ---- table

const table = { order: null, down: false, all: false };

function rows() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const kept = data.table.rows.filter((row) => words.every((word) => row.join(" ").toLowerCase().includes(word)));
  const { order, down } = table;
  if (order === null) return kept;
  const sign = down ? -1 : 1;
  return kept.sort((a, b) => {
    const [x, y] = [a[order], b[order]];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
  });
}

function cell(value) {
  const number = typeof value === "number";
  const text = value === null ? "" : number && !Number.isInteger(value) ? Number(value.toPrecision(5)) : value;
  return element("td", { className: number ? "number" : "", textContent: text, title: value ?? "" });
}

function fill() {
  const found = rows();
  const drawn = table.all ? found : found.slice(0, MOST_ROWS);
  document.querySelector("#estimates tbody").replaceChildren(...drawn.map((row) => element("tr", {}, ...row.map(cell))));
  byId("count").textContent = `${found.length.toLocaleString("en")} of ${data.table.rows.length.toLocaleString("en")} rows`;
  byId("more").hidden = drawn.length === found.length;
}

function estimates() {
  if (!byId("estimates")) return;
  const heads = data.table.columns.map((name, k) => {
    const head = element("th", { textContent: name.replaceAll("_", " "), tabIndex: 0 });
    head.onclick = () => {
      Object.assign(table, { down: table.order === k && !table.down, order: k });
      for (const other of heads) other.ariaSort = "none";
      head.ariaSort = table.down ? "descending" : "ascending";
      fill();
    };
    head.onkeydown = (event) => { if (event.key === "Enter") head.onclick(); };
    return head;
  });
  document.querySelector("#estimates thead").append(element("tr", {}, ...heads));
  byId("filter").oninput = fill;
  byId("more").onclick = () => { table.all = true; fill(); };
  byId("csv").onclick = save;
  fill();
}

// As RFC 4180 has it: the rows that are listed, in the order in which they are, numbers in full.
function csv() {
  const quoted = (value) => /[",\r\n]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value;
  return [data.table.columns, ...rows()].map((row) => row.map((value) => value === null ? "" : quoted(String(value))).join(",") + "\r\n").join("");
}

function save() {
  const url = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
  element("a", { href: url, download: "estimates.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// ----

(async () => {
  data = await unpack();
  legend();
  for (const card of document.querySelectorAll(".card")) card.querySelector(".swatch").style.background = colourOf(card.dataset.policy);
  browser();
  estimates();
  for (const place of document.querySelectorAll("[data-figure]")) await figure(place);
  document.body.dataset.ready = "true";
})();
