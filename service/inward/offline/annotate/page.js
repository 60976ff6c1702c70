'use strict';
// Rows are held as data and drawn a few at a time; texts are only ever set as text.
const {job, rows, columns} = JSON.parse(document.getElementById('data').textContent);
const AT_ONCE = 50, KEYS = {r: 'right', f: 'flip', d: 'drop'};
const $ = id => document.getElementById(id);
const list = $('list'), filters = document.querySelectorAll('[data-filter]');
let decisions = {}, shown = [], drawn = 0, at = 0, coloured = false;
try { decisions = JSON.parse(localStorage.getItem(job)) || {}; } catch (e) { /* storage is closed to files in some browsers */ }

const tag = (name, text, attributes) => {
  const element = Object.assign(document.createElement(name), attributes);
  if (text !== undefined) element.textContent = text;
  return element;
};
const number = (value, digits = 3) => value === null ? 'none' : value.toFixed(digits);
const wanted = {
  margin: row => row.margin, probability: row => row.probability, length: row => row.chosen.length - row.rejected.length,
};

function passes(row) {
  for (const filter of filters) {
    const value = filter.value;
    if (value === '') continue;
    const [kind, name] = filter.dataset.filter.split(' ');
    if (kind === 'least' && !(wanted[name](row) !== null && wanted[name](row) >= +value)) return false;
    if (kind === 'most' && !(wanted[name](row) !== null && wanted[name](row) <= +value)) return false;
    if (kind === 'agrees' && String(row.agrees) !== value) return false;
    if (kind === 'decision') {
      const decision = decisions[row.key];
      if (value === 'undecided' ? decision : value === 'decided' ? !decision : decision !== value) return false;
    }
    if (kind === 'text') {
      const words = value.toLowerCase();
      const texts = [...row.prompt.map(turn => turn.content), row.chosen, row.rejected];
      if (!texts.some(text => text.toLowerCase().includes(words))) return false;
    }
    if (kind === 'value') {
      const column = $('column').value;
      const have = column === '' ? Object.values(row.rest) : [row.rest[column]];
      if (!have.some(one => one !== undefined && String(one).toLowerCase().includes(value.toLowerCase()))) return false;
    }
  }
  return true;
}

function filter() {
  const [by, order] = $('sort').value.split(' ');
  const key = wanted[by] || (row => row.place), sign = order === 'down' ? -1 : 1;
  const value = row => key(row) === null ? Infinity : sign * key(row);
  shown = rows.filter(passes).sort((a, b) => value(a) - value(b) || a.place - b.place);
  list.replaceChildren();
  drawn = at = 0;
  more();
  mark();
}

function more() {
  const next = shown.slice(drawn, drawn + AT_ONCE);
  list.append(...next.map(article));
  drawn += next.length;
  $('more').hidden = drawn >= shown.length;
}

function article(row) {
  const element = tag('article', undefined, {className: 'row'});
  element.dataset.key = row.key;
  element.dataset.decision = decisions[row.key] || '';
  const facts = [`${row.source}, row ${row.row}`, `margin ${number(row.margin)}`,
    ...(row.probability === null ? [] : [`label right with probability ${number(row.probability)}`]),
    `${wanted.length(row) >= 0 ? '+' : ''}${wanted.length(row)} characters`,
    ...Object.entries(row.rest).map(([name, value]) => `${name}: ${value}`), decisions[row.key] || 'undecided'];
  const prompt = tag('div', undefined, {className: 'prompt'});
  for (const turn of row.prompt) prompt.append(tag('b', turn.role), tag('pre', turn.content));
  const both = tag('div', undefined, {className: 'both'});
  for (const side of ['chosen', 'rejected']) {
    const answer = tag('div');
    answer.append(tag('b', `${side}, ${number(row[side + '_score'])}`), text(row, side));
    both.append(answer);
  }
  element.append(tag('div', facts.join(' · '), {className: 'facts'}), prompt, both);
  element.addEventListener('click', () => { at = shown.indexOf(row); mark(); });
  return element;
}

// Below the answer's own mean is orange, above it blue; two answers of a pair have one scale.
function text(row, side) {
  const pieces = row[side + '_tokens'];
  if (!coloured || !pieces) return tag('pre', row[side]);
  const scores = ['chosen', 'rejected'].flatMap(name => (row[name + '_tokens'] || []).map(piece => piece[1]));
  const middle = scores.reduce((a, b) => a + b, 0) / scores.length;
  const spread = Math.max(...scores.map(score => Math.abs(score - middle)), 1e-9);
  const element = tag('pre');
  for (const [piece, score] of pieces) {
    const span = tag('span', piece, {title: number(score)});
    const strength = Math.min(1, Math.abs(score - middle) / spread) * 0.55;
    span.style.background = score < middle ? `rgba(209,116,42,${strength})` : `rgba(74,127,176,${strength})`;
    element.append(span);
  }
  return element;
}

function mark() {
  for (const element of list.querySelectorAll('.at')) element.classList.remove('at');
  while (at >= drawn && drawn < shown.length) more();
  const element = list.children[at];
  if (element) { element.classList.add('at'); element.scrollIntoView({block: 'nearest'}); }
  const decided = rows.filter(row => decisions[row.key]).length;
  $('count').textContent = `${shown.length} of ${rows.length} pairs, ${decided} decided`;
  $('export').disabled = !decided;
}

function decide(decision) {
  const row = shown[at];
  if (!row) return;
  if (decision) decisions[row.key] = decision; else delete decisions[row.key];
  try { localStorage.setItem(job, JSON.stringify(decisions)); } catch (e) { /* the file that is given out is what counts */ }
  redraw(one => one.key === row.key); // rows that repeat a pair share its decision
  if (decision && at + 1 < shown.length) at += 1;
  mark();
}

function redraw(changed) {
  for (let i = 0; i < drawn; i += 1) if (changed(shown[i])) list.children[i].replaceWith(article(shown[i]));
}

function move(step) {
  at = Math.max(0, Math.min(shown.length - 1, at + step));
  mark();
}

function colour() {
  coloured = !coloured;
  $('colour').setAttribute('aria-pressed', coloured);
  redraw(() => true);
  mark();
}

function save() {
  const quoted = value => `"${String(value).replaceAll('"', '""')}"`;
  const lines = rows.filter(row => decisions[row.key])
    .map(row => [quoted(row.source), row.row, row.key, decisions[row.key]].join(','));
  const file = new Blob([['source,row,key,decision', ...lines].join('\r\n') + '\r\n'], {type: 'text/csv'});
  const link = tag('a', undefined, {href: URL.createObjectURL(file), download: 'decisions.csv'});
  link.click();
  URL.revokeObjectURL(link.href);
}

document.addEventListener('keydown', event => {
  if (event.target.matches('input,select') || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (KEYS[key]) decide(KEYS[key]);
  else if (key === 'u') decide(null);
  else if (key === 'j' || key === 'arrowdown') move(1);
  else if (key === 'k' || key === 'arrowup') move(-1);
  else if (key === 'c' && !$('colour').hidden) colour();
  else return;
  event.preventDefault();
});
for (const name of columns) $('column').append(tag('option', name, {value: name}));
for (const element of [...filters, $('sort'), $('column')]) element.addEventListener('input', filter);
$('more').addEventListener('click', more);
$('export').addEventListener('click', save);
$('colour').addEventListener('click', colour);
$('colour').hidden = !rows.some(row => row.chosen_tokens);
filter();
