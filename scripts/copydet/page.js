"use strict";
// Pairs are sorted, best first. A card is an image with its answers: a query with what was found for it, or the image
// to keep of a group with the others. All cards are of equal size, and only those near the screen are in the document.
// Names reach it as text only.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const [slider, counts, viewButton, filterBox, list, closer, keys, more, nothing, nothingList] = ["threshold", "counts",
    "view", "filter", "cards", "closer", "keys", "more", "nothing", "nothing-list"].map(byId);
const [NAME, URI, THUMB, BLANK, WIDTH, HEIGHT, BYTES, CONTENT, RANK] = Array(9).keys();  // of a row of data.images
const COPY = "copy", NOT = "not a copy", UNSURE = "unsure", TO_DO = "to do", ALL = "all";
const MORE = 24;  // cards at once
const within = data.archive === null;
const lowest = data.pairs.length ? data.pairs[data.pairs.length - 1][2] : -4;
let view = within ? "groups" : "queries", filter = TO_DO, threshold = data.threshold;
let cards = [], columns = 1, cardHeight = 1, selected = 0, showsPoints = false;
const chosen = new Map();  // first image of a card -> the answer beside it
const look = { over: false, swapped: false, zoom: 1, x: 0, y: 0 };  // at the selected pair

function element(tag, properties, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const number = n => n.toLocaleString("en");
const percent = fraction => `${(100 * fraction).toFixed(0)} %`;
const plural = (n, one, several = one + "s") => `${number(n)} ${n === 1 ? one : several}`;
const isBlank = (...images) => images.some(image => data.images[image][BLANK]);  // one flat colour: alike, but no copy

function precision(score) {
  const { scores, precision: p } = data.calibration;
  const i = scores.findIndex(s => s >= score);
  if (i <= 0) return i ? p[p.length - 1] : p[0];
  return p[i - 1] + (p[i] - p[i - 1]) * (score - scores[i - 1]) / (scores[i] - scores[i - 1]);
}

function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB"];
  let unit = 0;
  for (; bytes >= 1000 && unit < 3; unit++) bytes /= 1000;
  return `${unit && bytes < 10 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
}

// Decisions: kept in the browser, for these two collections, and in decisions.csv ------------------------------------

const fullName = (image, side) => data.places[side] + data.images[image][NAME];
const keyOf = (a, b) => (within && a > b ? [b, a] : [a, b]).join();
const store = `find_copies ${JSON.stringify(data.collections)}`;
const verdicts = new Map();  // key of a pair -> { pair, verdict, score }; no verdict: it was taken back
let elsewhere = [];  // decisions on pairs that are not on the page: [query, reference, verdict, score]
const undone = [];  // what the last decisions replaced: [card's image, [[key, entry or undefined]]]
let pairOf = null;  // key -> pair

function findPair(a, b) {
  if (!pairOf) pairOf = new Map(data.pairs.map(pair => [keyOf(pair[0], pair[1]), pair]));
  return pairOf.get(keyOf(a, b));
}

const verdictOf = (a, b) => (verdicts.size && verdicts.get(keyOf(a, b))?.verdict) || "";

// Of --decisions and the browser's, which wins where they differ: the file, until something is decided on this page.
function readDecisions() {
  let kept = { read: "", rows: [] };
  try {
    kept = JSON.parse(localStorage.getItem(store)) || kept;
  } catch { say("This browser keeps no decisions."); }
  if (!data.decisions.length && !kept.rows.length) return;
  const both = kept.read === data.decided ? [...data.decisions, ...kept.rows] : [...kept.rows, ...data.decisions];
  const rows = [new Map(), new Map()], others = new Map();
  for (const [a, b] of data.pairs) {
    for (const [image, side] of within ? [[a, 0], [a, 1], [b, 0], [b, 1]] : [[a, 0], [b, 1]]) {
      rows[side].set(fullName(image, side), image);
    }
  }
  for (const [query, reference, verdict, score = ""] of both) {  // later ones win
    const a = rows[0].get(query), b = rows[1].get(reference);
    if (a === undefined || b === undefined) others.set(`${query}\0${reference}`, [query, reference, verdict, score]);
    else setVerdict(a, b, verdict);
  }
  elsewhere = [...others.values()];
}

function setVerdict(a, b, verdict) {
  const key = keyOf(a, b), pair = findPair(a, b), [query, reference] = within && a > b ? [b, a] : [a, b];
  verdicts.set(key, { pair: [query, reference], verdict, score: pair ? pair[2] : "" });
}

function decisionRows() {
  return [...[...verdicts.values()].map(({ pair: [a, b], verdict, score }) =>
      [fullName(a, 0), fullName(b, 1), verdict, score]), ...elsewhere];
}

function keepDecisions() {
  try {
    localStorage.setItem(store, JSON.stringify({ read: data.decided, rows: decisionRows() }));
  } catch {
    say("The browser has no room for this decision: save decisions.csv.");
  }
}

function decisionsCsv() {
  const field = value => /[",\r\n]|^\s|\s$/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value);
  const rows = decisionRows().filter(([, , verdict]) => verdict);
  return [["query", "reference", "verdict", "score"], ...rows].map(row => row.map(field).join() + "\r\n").join("");
}

function saveDecisions() {
  const url = URL.createObjectURL(new Blob([decisionsCsv()], { type: "text/csv" }));
  element("a", { href: url, download: "decisions.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  say("decisions.csv is among your downloads; find_copies.py --decisions reads it.");
}

function decide(verdict) {
  const card = cards[selected];
  const answer = card && answerOf(card), images = answer ? answer.images : card?.twins;
  if (!images?.length) return;
  undone.push([card.image, images.map(image => [keyOf(card.image, image), verdicts.get(keyOf(card.image, image))])]);
  for (const image of images) setVerdict(card.image, image, verdict);
  chosen.delete(card.image);
  keepDecisions();
  say(`${verdict}: ${data.images[card.image][NAME]} and ${data.images[images[0]][NAME]}; z takes it back`);
  changed();
}

function undo() {
  const last = undone.pop();
  if (!last) return say("Nothing to take back.");
  for (const [key, before] of last[1]) {
    if (before) verdicts.set(key, before); else verdicts.get(key).verdict = "";  // stands against the file's
  }
  keepDecisions();
  say("Taken back.");
  update();
  const back = cards.findIndex(card => card.image === last[0]);
  if (back >= 0) select(back);
  if (closer.open) open(selected);
}

function changed() {
  update();
  if (closer.open) cards.length ? open(selected) : closer.close();
  else if (cards.length) select(selected);
}

function say(text) { byId("said").textContent = text; }

// Cards of the pairs at or above the threshold -----------------------------------------------------------------------

function countAbove() {
  let low = 0, high = data.pairs.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (data.pairs[middle][2] >= threshold) low = middle + 1; else high = middle;
  }
  return low;
}

// Files of the same bytes are one answer. turned: the card's image is the second of the pair, as its match has it.
function addAnswer(card, image, score, match, region, turned = false) {
  const content = data.images[image][CONTENT], known = card.byContent.get(content);
  if (known) return void known.images.push(image);
  const answer = { images: [image], score, match, region, turned, verdict: verdictOf(card.image, image) };
  card.byContent.set(content, answer);
  card.answers.push(answer);
}

const newCard = (image, twins = []) => ({ image, twins, answers: [], byContent: new Map() });

function queryCards(pairs) {
  const found = new Map();
  for (const [query, reference, score, match, region] of pairs) {
    if (!found.has(query)) found.set(query, newCard(query));
    addAnswer(found.get(query), reference, score, match, region);
  }
  return [...found.values()];
}

const links = match => !match || match.verdict === COPY || data.asked && match.verdict === "not verifiable";

function groupCards(pairs) {  // what equal bytes and links make, but for what is told to be apart; see duplicates.py
  const parent = new Map(), foes = new Map(), best = new Map(), groups = new Map(), first = new Map();
  const root = image => {
    if (!parent.has(image)) parent.set(image, image);
    while (parent.get(image) !== image) {
      parent.set(image, parent.get(parent.get(image)));
      image = parent.get(image);
    }
    return image;
  };
  for (const { pair: [a, b], verdict } of verdicts.values()) {
    if (verdict !== NOT) continue;
    for (const [one, other] of [[a, b], [b, a]]) foes.set(one, (foes.get(one) || new Set()).add(other));
  }
  const join = (a, b) => {
    [a, b] = [root(a), root(b)];
    if (a === b || [...foes.get(a) || []].some(foe => root(foe) === b)) return;
    parent.set(b, a);
    if (foes.has(b)) foes.set(a, new Set([...foes.get(a) || [], ...foes.get(b)]));
  };
  data.images.forEach((row, image) => {
    if (first.has(row[CONTENT])) join(first.get(row[CONTENT]), image); else first.set(row[CONTENT], image);
  });
  for (const [a, b, score, match] of pairs) {
    if (!links(match)) continue;
    join(a, b);
    for (const image of [a, b]) if (!best.has(image)) best.set(image, score);
  }
  for (const image of parent.keys()) {
    const group = root(image);
    if (groups.has(group)) groups.get(group).push(image); else groups.set(group, [image]);
  }
  const rank = image => data.images[image][RANK];
  const top = images => images.reduce((most, image) => Math.max(most, best.get(image) ?? -Infinity), -Infinity);
  return [...groups.values()].filter(images => images.length > 1).map(images => {
    const [keep, ...others] = images.sort((a, b) => rank(a) - rank(b)), same = data.images[keep][CONTENT];
    const card = newCard(keep, others.filter(image => data.images[image][CONTENT] === same));
    for (const image of others.filter(image => data.images[image][CONTENT] !== same)) {
      const pair = findPair(keep, image);
      addAnswer(card, image, pair ? pair[2] : best.get(image), pair?.[3], null, pair?.[0] !== keep);
    }
    card.answers.sort((a, b) => b.score - a.score);
    return Object.assign(card, { score: top(images) });
  }).sort((a, b) => b.score - a.score);
}

function judgedCards(verdict) {
  const pairs = [...verdicts.values()].filter(entry => entry.verdict === verdict)
      .map(({ pair: [a, b] }) => findPair(a, b) || [a, b, -Infinity, null]);
  return queryCards(pairs.sort((a, b) => b[2] - a[2]));
}

function toJudge(card) {  // decisions that it asks for: [there are, there were]
  if (card.answers.length) return [card.answers.filter(answer => !answer.verdict).length, card.answers.length];
  return [card.twins.some(image => !verdictOf(card.image, image)) ? 1 : 0, 1];
}

function filtered(made) {
  if (filter !== TO_DO && filter !== ALL) return judgedCards(filter);
  if (filter === ALL || !verdicts.size) return made;
  return made.filter(card => toJudge(card)[0]).map(card =>
      ({ ...card, answers: card.answers.filter(answer => !answer.verdict) }));
}

function showProgress(made, pairs) {  // files of the same bytes count once
  const contents = (a, b) => [a, b].map(image => data.images[image][CONTENT]).join();
  const judged = new Map(), above = new Set(), byVerdict = new Map([COPY, NOT, UNSURE].map(verdict => [verdict, 0]));
  for (const { pair, verdict } of verdicts.values()) if (verdict) judged.set(contents(...pair), verdict);
  for (const verdict of judged.values()) byVerdict.set(verdict, byVerdict.get(verdict) + 1);
  if (judged.size) for (const [a, b] of pairs) above.add(contents(a, b));
  const gone = ([key, verdict]) => verdict === NOT && (view === "groups" || above.has(key));  // from all cards
  let left = 0, all = [...judged].filter(gone).length;
  for (const card of made) [left, all] = [left + toJudge(card)[0], all + toJudge(card)[1]];
  Object.assign(byId("progress"), { max: Math.max(1, all), value: all - left });
  byId("judged").textContent = `${number(all - left)} of ${number(all)} judged` + (judged.size ? `: ${
      [...byVerdict].filter(([, n]) => n).map(([verdict, n]) => `${number(n)} ${verdict}`).join(", ")}` : "");
}

const answerOf = card => card.answers[Math.max(0, card.answers.findIndex(a => a.images[0] === chosen.get(card.image)))];

function update() {
  const above = data.pairs.slice(0, countAbove()), pairs = above.filter(([a, b]) => !isBlank(a, b));
  const likely = verdicts.size ? pairs.filter(([a, b]) => verdictOf(a, b) !== NOT) : pairs;
  const makeCards = view === "groups" ? groupCards : queryCards, made = makeCards(likely);
  cards = filtered(filter === ALL && view !== "groups" ? makeCards(pairs) : made);
  selected = Math.max(0, Math.min(selected, cards.length - 1));
  const of = view === "groups" ? plural(cards.length, "group") : within ? plural(cards.length, "image") :
      `${number(cards.length)} of ${plural(data.count[0], "query", "queries")}`;
  const blanks = above.length - pairs.length;
  counts.textContent = `${plural(pairs.length, "pair")}, ${of}, score from ${threshold.toFixed(4)}` +
      (data.calibration ? `, precision from ${percent(precision(threshold))}` : "") +
      (blanks ? `; ${plural(blanks, "pair")} of blank images left out` : "");
  showProgress(made, pairs);
  viewButton.textContent = view === "groups" ? "by image" : "groups";
  showRest(pairs.length, likely);
  layout();
}

function showRest(shown, likely) {  // what stands below the cards
  const left = data.pairs.length - countAbove();
  more.hidden = !left || filter !== TO_DO && filter !== ALL;
  more.textContent = `show more (m): ${plural(left, "pair")} below ${threshold.toFixed(4)}`;
  byId("end").textContent = cards.length ? "" : shown ? "Nothing here: all is judged, or nothing is of this kind." :
      data.pairs.length ? "No likely copy." : "No pairs.";
  nothing.hidden = within;
  if (within) return;
  const found = new Set(likely.map(([query]) => query)), queries = new Set(data.pairs.map(([query]) => query));
  nothing.without = [...[...queries].filter(q => !found.has(q)).map(q => data.images[q][NAME]), ...data.others].sort();
  nothing.hidden = !nothing.without.length;
  byId("nothing-count").textContent = `${plural(nothing.without.length, "query", "queries")}: nothing found`;
  nothingList.replaceChildren();
  if (nothing.open) listNothing();
}

function listNothing() {  // some hundred names at a time
  const start = nothingList.querySelectorAll("li").length, names = nothing.without.slice(start, start + 500);
  nothingList.querySelector("button")?.remove();
  nothingList.append(...names.map(name => element("li", {}, name)));
  const left = nothing.without.length - start - names.length;
  if (left) nothingList.append(element("button", { onclick: listNothing }, `${number(left)} more`));
}

function showMore() {  // lower the threshold until some more cards are there
  if (more.hidden) return;
  const above = countAbove(), known = new Set(data.pairs.slice(0, above).map(([query]) => query));
  const target = known.size + MORE;
  let at = above;
  for (; at < data.pairs.length && known.size < target; at++) {
    const [a, b] = data.pairs[at];
    if (!isBlank(a, b)) known.add(a);
  }
  if (at > above) move(data.pairs[at - 1][2]);
}

// Cards near the screen -----------------------------------------------------------------------------------------------

let nodes = new Map();  // card's first image -> { node, state }: what is drawn, and of which state

function layout() {
  const style = getComputedStyle(document.documentElement), pixels = name => parseFloat(style.getPropertyValue(name));
  cardHeight = pixels("--card");
  columns = Math.max(1, Math.floor(list.clientWidth / pixels("--least")));
  list.style.setProperty("--columns", columns);
  list.style.height = `${Math.ceil(cards.length / columns) * cardHeight}px`;
  draw();
}

function draw() {
  const top = scrollY - list.offsetTop, first = Math.floor((top - innerHeight) / cardHeight) * columns;
  const last = Math.ceil((top + 2 * innerHeight) / cardHeight) * columns, drawn = new Map();
  for (let i = Math.max(0, first); i < Math.min(last, cards.length); i++) {
    const card = cards[i], answer = answerOf(card), mine = i === selected;
    const state = JSON.stringify([card.answers.map(a => [a.images, a.verdict]), answer?.images[0], card.twins,
                                  showsPoints, mine && (look.over || look.swapped) && [look.over, look.swapped]]);
    let old = nodes.get(card.image);
    if (old?.state !== state) old = { node: cardNode(card, answer, mine), state };
    old.node.style.top = `${Math.floor(i / columns) * cardHeight}px`;
    old.node.style.left = `${100 * (i % columns) / columns}%`;
    old.node.classList.toggle("selected", mine);
    old.node.tabIndex = mine ? 0 : -1;
    drawn.set(card.image, old);
  }
  const focused = document.activeElement?.closest?.(".card");
  for (const [image, { node }] of nodes) if (drawn.get(image)?.node !== node) node.remove();
  let at = list.firstChild;  // in the document in their order, for who reads or tabs through them
  for (const { node } of drawn.values()) {
    if (node === at) at = at.nextSibling; else list.insertBefore(node, at);
  }
  nodes = drawn;
  if (focused && !focused.isConnected) focusSelected();
}

const focusSelected = () => nodes.get(cards[selected]?.image)?.node.focus({ preventScroll: true });
const indexOf = card => cards.findIndex(({ image }) => image === card.image);  // nodes may be older than cards

function thumbnail(image) {
  const [name, , thumb] = data.images[image];
  return thumb ? element("img", { src: `thumbs/${thumb}`, alt: name, draggable: false })
               : element("div", { className: "none" }, "no image");
}

function frame(image, content, ...above) {  // an image in its square box, with what is drawn upon it
  const [width, height] = [data.images[image][WIDTH] || 1, data.images[image][HEIGHT] || 1];
  const node = element("div", { className: "frame" }, content, ...above);
  node.style.width = `${100 * Math.min(1, width / height)}%`;
  node.style.height = `${100 * Math.min(1, height / width)}%`;
  return node;
}

function shape(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

let pointsRead = false;
function pointsOf(match) {  // that are shown, of those that agree
  if (!showsPoints) return [];
  const source = byId("points");
  if (!pointsRead && source) {
    JSON.parse(source.textContent).forEach((text, i) => { if (text) data.pairs[i][3].points = text; });
    pointsRead = true;
  }
  return match.points?.split(" ") || [];
}

function showPoints() {
  showsPoints = !showsPoints;
  document.body.classList.toggle("points", showsPoints);
  closer.open ? open(selected) : draw();
}

// What an answer says of the query (side 0) or of the reference (1), in thousandths: where local features lay each in
// the other; else the region of the query that is nearest.
function drawing({ match, region, turned }, side) {
  const svg = shape("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none", "aria-hidden": true });
  if (match?.outlines) {
    const kind = match.verdict === COPY ? "" : "part";
    const of = turned ? 1 - side : side, points = pointsOf(match);
    svg.append(shape("polygon", { points: match.outlines[of].join(" "), class: kind }));
    for (let i = 2 * of; i < points.length; i += 4) {
      const [x, y] = points.slice(i, i + 2);
      svg.append(shape("line", { x1: x, y1: y, x2: x, y2: y }));
    }
  } else if (region && !side) svg.append(shape("polygon", { points: region.join(" "), class: "region" }));
  return svg;
}

// The two images of a pair, side by side in boxes of one size, or the second laid upon the first. pictures(image): the
// nodes to show.
function pairBoxes(card, answer, pictures, mine) {
  const box = (...content) => element("div", { className: "box" }, element("div", { className: "zoomed" }, ...content));
  const first = frame(card.image, pictures(card.image), drawing(answer || {}, 0));
  if (!answer) return [box(first)];
  const image = answer.images[0], second = pictures(image);
  if (!mine || !look.over) {
    const boxes = [box(first), box(frame(image, second, drawing(answer, 1)))];
    return mine && look.swapped ? boxes.reverse() : boxes;
  }
  second.classList.add("laid");
  if (look.swapped) second.classList.add("full");
  const corners = (answer.match?.outlines?.[answer.turned ? 1 : 0] || answer.region)?.map(c => c / 1000);
  if (corners) {  // top left, top right, bottom right, bottom left of the reference in the query, whose sides are 1
    const [x0, y0, x1, y1, , , x3, y3] = corners;
    const ratio = (data.images[card.image][WIDTH] || 1) / (data.images[card.image][HEIGHT] || 1);
    second.style.transform = `translate(${100 * x0}%, ${100 * y0}%) matrix(${x1 - x0}, ${(y1 - y0) / ratio}, ${
        (x3 - x0) * ratio}, ${y3 - y0}, 0, 0)`;
  }
  first.append(second);
  return [box(first)];
}

function scoreText(answer, ...images) {
  if (!Number.isFinite(answer.score)) return "no score";
  return (answer.match ? `${answer.match.verdict}, ` : "") + answer.score.toFixed(4) +
      (isBlank(...images) ? ", blank" : data.calibration ? `, ${percent(precision(answer.score))}` : "");
}

function facts(image, label, times) {
  const [name, uri, , , width, height, bytes] = data.images[image], side = label === "query" ? 0 : 1;
  const text = [width && `${number(width)} × ${number(height)} px`, bytes && size(bytes),
                times > 1 && `× ${number(times)}`];
  const shown = uri ? element("a", { href: uri, target: "_blank", rel: "noopener" }, name) : element("span", {}, name);
  shown.title = fullName(image, side);
  return element("div", { className: "facts" }, element("span", {}, element("b", {}, `${label} `), shown),
                 element("span", {}, text.filter(Boolean).join(", ") || "no file"));
}

function deciders(card, answer) {
  const now = answer ? answer.verdict : verdictOf(card.image, card.twins[0]);
  return element("div", { className: "deciders" }, ...[[COPY, "c"], [NOT, "n"], [UNSURE, "u"]].map(([verdict, key]) => {
    const button = element("button", { title: key, onclick: () => { selected = indexOf(card); decide(verdict); } },
                           verdict);
    button.setAttribute("aria-pressed", now === verdict);
    return button;
  }));
}

const labels = () => view === "groups" ? ["keep", "duplicate"] : within ? ["image", "answer"] : ["query", "answer"];

function smallOnes(card, answer) {  // the other answers
  const others = card.answers.filter(other => other !== answer), some = others.slice(0, 12);
  return [...some.map(other => {
    const text = `${scoreText(other, card.image, other.images[0])}: ${data.images[other.images[0]][NAME]}`;
    const button = element("button", { className: "small", title: text, onclick: () => choose(card, other) },
                           thumbnail(other.images[0]));
    if (other.images.length > 1) button.append(element("span", {}, `× ${other.images.length}`));
    button.setAttribute("aria-label", `look at ${text}`);
    return button;
  }), others.length > some.length ? element("span", { className: "rest" }, `+ ${others.length - some.length}`) : ""];
}

function cardNode(card, answer, mine) {
  const [first, second] = labels(), boxes = pairBoxes(card, answer, thumbnail, mine);
  const pair = element("div", { className: `pair${boxes.length === 1 ? " one" : ""}`,
                                onclick: () => open(indexOf(card)) }, ...boxes);
  const files = [...card.byContent.values()].reduce((n, { images }) => n + images.length, 1 + card.twins.length);
  const said = [view === "groups" && plural(files, "file"),
                answer ? scoreText(answer, card.image, answer.images[0]) : "same bytes"];
  const onclick = () => { if (indexOf(card) >= 0) { selected = indexOf(card); soon(draw); } };
  const node = element("article", { className: "card", onclick }, pair,
      element("div", { className: "about" }, element("div", { className: "score" }, said.filter(Boolean).join(": ")),
              facts(card.image, first, 1 + card.twins.length),
              ...answer ? [facts(answer.images[0], second, answer.images.length)] : [], deciders(card, answer),
              element("div", { className: "others" }, ...smallOnes(card, answer))));
  node.setAttribute("aria-label", `${first} ${data.images[card.image][NAME]}` +
      (answer ? `, ${second} ${data.images[answer.images[0]][NAME]}` : "") + `, ${said.filter(Boolean).join(", ")}`);
  return node;
}

let waiting = false;
function soon(work) {  // at most once a frame
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; work(); });
}

function select(i) {
  if (!cards.length) return;
  selected = Math.max(0, Math.min(i, cards.length - 1));
  const y = list.offsetTop + Math.floor(selected / columns) * cardHeight, sticky = byId("bar").offsetHeight;
  if (y < scrollY + sticky || y + cardHeight > scrollY + innerHeight) scrollTo(0, y - sticky - 8);
  draw();
  focusSelected();
}

function choose(card, answer) {
  selected = indexOf(card);
  chosen.set(card.image, answer.images[0]);
  closer.open ? open(selected) : select(selected);
}

function step(direction) {  // to the next answer of the selected card
  const card = cards[selected], k = card ? card.answers.indexOf(answerOf(card)) + direction : -1;
  if (card?.answers[k]) choose(card, card.answers[k]);
}

// A pair, large: the original where it still is, else its thumbnail ---------------------------------------------------

function original(image) {
  const [name, uri, thumb] = data.images[image], img = element("img", { alt: name, draggable: false });
  img.onerror = () => { img.onerror = null; if (thumb) img.src = `thumbs/${thumb}`; };
  img.src = uri || (thumb ? `thumbs/${thumb}` : "data:,");
  return img;
}

function zoom(factor, x = 0, y = 0) {  // both images alike; x and y in parts of the box
  look.zoom = Math.max(1, Math.min(16, look.zoom * factor));
  const far = (look.zoom - 1) / 2;
  [look.x, look.y] = [look.x + x, look.y + y].map(at => Math.max(-far, Math.min(far, at)));
  for (const [name, value] of [["--zoom", look.zoom], ["--x", look.x], ["--y", look.y]]) {
    closer.style.setProperty(name, value);
  }
}

function open(i) {
  const card = cards[i];
  if (!card) return;
  if (i !== selected || !closer.open) Object.assign(look, { zoom: 1, x: 0, y: 0 });
  selected = i;
  const answer = answerOf(card), [first, second] = labels(), shown = [facts(card.image, first, 1 + card.twins.length)];
  if (answer) shown.push(facts(answer.images[0], second, answer.images.length));
  if (look.swapped && !look.over) shown.reverse();
  const inliers = answer?.match?.inliers ? `, ${plural(answer.match.inliers, "point")} match` : "";
  const boxes = pairBoxes(card, answer, original, true);
  closer.replaceChildren(
      element("div", { className: "row" }, element("span", { className: "score" }, answer ?
          `${card.answers.indexOf(answer) + 1} of ${card.answers.length}: ` +
          `${scoreText(answer, card.image, answer.images[0])}${inliers}` :
          `${card.twins.length + 1} files, same bytes`),
          deciders(card, answer),
          ...[["overlay", "o"], ["swap", "x"], ["close", "Escape"]].map(([name, key]) =>
              element("button", { onclick: () => actions[key](), title: key }, name))),
      element("div", { className: `pair${boxes.length === 1 ? " one" : ""}` }, ...boxes),
      element("div", { className: "row even" }, ...shown));
  zoom(1);
  if (!closer.open) closer.showModal();
  draw();
}

closer.addEventListener("wheel", event => {
  if (!event.target.closest(".box")) return;
  event.preventDefault();
  zoom(event.deltaY < 0 ? 1.25 : 0.8);
}, { passive: false });
closer.addEventListener("pointermove", event => {
  const box = event.target.closest(".box");
  if (box && event.buttons & 1) zoom(1, event.movementX / box.clientWidth, event.movementY / box.clientHeight);
});
closer.addEventListener("close", () => { draw(); if (cards.length) select(selected); });

// Controls ------------------------------------------------------------------------------------------------------------

function move(to) {
  slider.value = threshold = Math.max(slider.min, Math.min(to, slider.max));
  soon(update);
}

function lookOtherwise(change) {
  Object.assign(look, change);
  closer.open ? open(selected) : draw();
}

function showFilter(name) {
  filter = filterBox.value = name;
  selected = 0;
  scrollTo(0, 0);
  update();
}

function nextFilter() {
  const names = [...filterBox.options].map(option => option.value);
  showFilter(names[(names.indexOf(filter) + 1) % names.length]);
}

const nudge = direction => move(threshold + direction * (slider.max - slider.min) / 100);
const actions = {  // everywhere
  c: () => decide(COPY), n: () => decide(NOT), u: () => decide(UNSURE), z: undo, e: saveDecisions,
  ArrowRight: () => step(1), ArrowLeft: () => step(-1), x: () => lookOtherwise({ swapped: !look.swapped }),
  o: () => lookOtherwise({ over: !look.over }), p: showPoints, Escape: () => closer.close(),
};
const onPage = {
  j: () => select(selected + 1), k: () => select(selected - 1), ArrowDown: () => select(selected + columns),
  ArrowUp: () => select(selected - columns), Home: () => select(0), End: () => select(cards.length - 1),
  "+": () => nudge(1), "=": () => nudge(1), "-": () => nudge(-1), m: showMore, f: nextFilter,
  g: () => viewButton.click(), Enter: () => open(selected), "?": () => keys.open ? keys.close() : keys.showModal(),
};
const inCloser = {
  j: () => open(Math.min(selected + 1, cards.length - 1)), k: () => open(Math.max(selected - 1, 0)),
  "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: () => zoom(0),
  w: () => zoom(1, 0, 0.1), s: () => zoom(1, 0, -0.1), a: () => zoom(1, 0.1, 0), d: () => zoom(1, -0.1, 0),
};
addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key, target } = event, moves = /^(Arrow|Home|End)/.test(key);
  if (keys.open && key !== "?" || closer.open && key === "Escape") return;
  if (moves && (target === slider || target === filterBox) || target === filterBox && key.length === 1) return;
  if (["BUTTON", "A", "SUMMARY"].includes(target.tagName) && key === "Enter") return;
  const action = (closer.open ? inCloser : onPage)[key] || actions[key];
  if (action) { event.preventDefault(); action(); }
});
slider.oninput = () => move(slider.valueAsNumber);
filterBox.onchange = () => showFilter(filterBox.value);
viewButton.hidden = !within;
viewButton.onclick = () => {
  if (!within) return;
  view = view === "groups" ? "queries" : "groups";
  selected = 0;
  scrollTo(0, 0);
  update();
};
byId("help").onclick = onPage["?"];
byId("save").onclick = saveDecisions;
more.onclick = showMore;
nothing.ontoggle = () => { if (nothing.open && !nothingList.childElementCount) listNothing(); };
addEventListener("scroll", () => soon(draw), { passive: true });
addEventListener("resize", () => soon(layout));

byId("title").textContent = within ? `Near-duplicates in ${data.queries}` : `${data.queries} in ${data.archive}`;
document.title = byId("title").textContent;
byId("notes").textContent = [
  `Opens at score ${data.threshold.toFixed(4)}: ${data.basis}.`,
  data.left_out ? `The best ${plural(data.pairs.length, "pair")}; ${number(data.left_out)} more are left out.` : "",
  data.skipped ? `${plural(data.skipped, "image")} could not be read: skipped.csv.` : "",
  data.same_files ?
      `${plural(data.same_files, "pair")} are one file under two names, by links: no copies, see pairs.csv.` : "",
  data.calibration ? `Precision as measured where ${percent(data.calibration.copies_ratio)} of the queries had a copy.` :
      "Scores only: the checkpoint carries no calibration.",
].filter(Boolean).join(" ");
slider.min = Math.floor(1e4 * Math.min(lowest, threshold)) / 1e4;  // a slider rounds
slider.max = Math.max(0, threshold, data.pairs.length ? data.pairs[0][2] : 0);
slider.value = threshold;
readDecisions();
update();
