"use strict";
// Texts reach the page by textContent alone, so none of them is ever read as markup.

for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.parentElement.nextElementSibling.textContent);
    button.textContent = "Copied";
  });
}

const frame = document.getElementById("map");
if (frame !== null) draw(frame).catch((error) => say(error.message, true));

function say(text, bad = false) {
  const said = document.getElementById("said");
  said.textContent = text;
  said.className = bad ? "fault" : "faint";
}

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  if (text) made.textContent = text;
  made.append(...children);
  made.dir = "auto";
  return made;
}

async function load(path, parameters) {
  const query = new URLSearchParams(parameters);
  const answer = await fetch(`/explore/${path}?${query}`);
  const data = await answer.json();
  if (!answer.ok) throw new Error(data.error.message);
  return data;
}

async function draw(frame) {
  const { table, by } = frame.dataset;
  // The points come while Bokeh is still on its way.
  const [{ groups, projection, rows, command }] = await Promise.all(
    [load("points", { table, by }), script("bokeh-api")]);
  const points = joined(groups);
  const count = points.keys.length;
  if (count === 0) return say(`The rows have no places yet. This makes them: ${command}`);
  const plot = Bokeh.Plotting.figure({
    tools: [], toolbar_location: null, sizing_mode: "stretch_both", outline_line_color: null,
    background_fill_alpha: 0, border_fill_alpha: 0, min_border: 0, match_aspect: false,
  });
  plot.xaxis.visible = plot.yaxis.visible = plot.xgrid.visible = plot.ygrid.visible = false;
  whole(plot, frame);
  const size = Math.max(2.5, Math.min(7, 500 / Math.sqrt(count)));
  const source = new Bokeh.ColumnDataSource(
    { data: { x: points.x, y: points.y, colour: points.colours } });
  const dots = plot.scatter({ field: "x" }, { field: "y" },
    { source, size, color: { field: "colour" }, line_color: null, fill_alpha: 0.75 });
  const ink = getComputedStyle(document.body).color;
  const found = new Bokeh.ColumnDataSource({ data: { x: [], y: [] } });
  plot.scatter({ field: "x" }, { field: "y" }, { source: found, marker: "star", size: size + 12,
    fill_color: "#e11d48", line_color: ink });
  const around = new Bokeh.LassoSelectTool({ renderers: [dots], continuous: false });
  const wheel = new Bokeh.WheelZoomTool({});
  plot.add_tools(around, wheel);
  plot.toolbar.active_drag = around;
  plot.toolbar.active_scroll = wheel;
  await Bokeh.Plotting.show(plot, frame);
  legend(groups, points, dots);
  hover(plot, frame, table, points);
  lasso(source, table, groups, points);
  light(frame, table, points, found);
  // Bokeh paints in the next frame of the browser.
  await new Promise((painted) => requestAnimationFrame(() => setTimeout(painted)));
  say(`${count.toLocaleString("en")} of ${rows.toLocaleString("en")} rows, by ${projection}.`);
  frame.dataset.rows = count;
}

function script(id) {
  return window.Bokeh?.Plotting ? undefined : new Promise((done, failed) => {
    const tag = document.getElementById(id);
    tag.addEventListener("load", done);
    tag.addEventListener("error", () => failed(new Error("Bokeh could not be loaded.")));
  });
}

function floats(text) {
  const characters = atob(text), bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return new Float32Array(bytes.buffer);
}

// All groups in one: keys, places, colours with their opacity, and which group a row is in.
function joined(groups) {
  const keys = groups.flatMap((group) => group.keys);
  const points = { keys, x: new Float32Array(keys.length), y: new Float32Array(keys.length),
                   colours: new Uint32Array(keys.length), groups: new Uint16Array(keys.length),
                   hidden: new Set() };
  let start = 0;
  groups.forEach((group, number) => {
    const end = start + group.keys.length;
    points.x.set(floats(group.x), start);
    points.y.set(floats(group.y), start);
    points.colours.fill(parseInt(`${group.colour.slice(1)}ff`, 16), start, end);
    points.groups.fill(number, start, end);
    start = end;
  });
  return points;
}

// The unit square, as wide as it is high, in the middle of the frame.
function whole(plot, frame) {
  const { clientWidth: width, clientHeight: height } = frame;
  for (const [range, length] of [[plot.x_range, width], [plot.y_range, height]]) {
    const half = (0.52 * length) / Math.min(width, height);
    range.setv({ start: 0.5 - half, end: 0.5 + half });
  }
}

// A press hides a group, the next one shows it again.
function legend(groups, points, dots) {
  const { hidden } = points;
  document.getElementById("legend").replaceChildren(...groups.map((group, number) => {
    const swatch = element("i");
    swatch.style.background = group.colour;
    const button = element("button", "", swatch, element("span", group.label),
      element("small", group.keys.length.toLocaleString("en")));
    button.ariaPressed = true;
    button.addEventListener("click", () => {
      if (!hidden.delete(number)) hidden.add(number);
      button.ariaPressed = !hidden.has(number);
      const indices = [];
      points.groups.forEach((one, row) => { if (!hidden.has(one)) indices.push(row); });
      dots.view.filter = new Bokeh.IndexFilter({ indices });
    });
    return button;
  }));
}

// The row nearest to the pointer, at most twelve pixels away, or -1.
function nearest(plot, frame, points, { x, y }) {
  let best = -1;
  let least = (12 * (plot.x_range.end - plot.x_range.start) / frame.clientWidth) ** 2;
  for (let row = 0; row < points.keys.length; row++) {
    const distance = (points.x[row] - x) ** 2 + (points.y[row] - y) ** 2;
    if (distance < least && !points.hidden.has(points.groups[row])) {
      [best, least] = [row, distance];
    }
  }
  return best;
}

function hover(plot, frame, table, points) {
  const tip = document.getElementById("tip");
  let wanted = -1;
  const leave = () => { wanted = -1; tip.hidden = true; };
  plot.on_event("mouseleave", leave);
  plot.on_event("doubletap", () => whole(plot, frame));
  plot.on_event("mousemove", async (event) => {
    const row = nearest(plot, frame, points, event);
    if (row < 0) return leave();
    if (row === wanted) return;
    wanted = row;
    const [found] = await load("rows", { table, key: points.keys[row] });
    if (wanted !== row || !found) return;
    tip.replaceChildren(...Object.entries(found.row).filter(([, value]) => value !== null)
      .map(([name, value]) => element("p", "", element("small", `${name} `), String(value))));
    tip.hidden = false;
    const box = frame.getBoundingClientRect();
    const x = box.x + scrollX + event.sx + 14;
    tip.style.left = `${Math.max(4, Math.min(x, document.body.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${box.y + scrollY + event.sy + 14}px`;
  });
}

function lasso(source, table, groups, points) {
  const chosen = document.getElementById("chosen");
  source.selected.properties.indices.change.connect(async () => {
    const rows = source.selected.indices;
    if (rows.length === 0) return chosen.replaceChildren();
    // A head of a request has its bound, and nobody reads more.
    const query = [["table", table]];
    for (const row of rows.slice(0, 50)) query.push(["key", points.keys[row]]);
    const found = await load("rows", query);
    const names = Object.keys(found[0]?.row ?? {});
    const head = element("tr", "", ...names.map((name) => element("th", name)));
    const body = found.map(({ row }) =>
      element("tr", "", ...names.map((name) => element("td", String(row[name] ?? "").slice(0, 300)))));
    const box = element("div", "", element("table", "", head, ...body));
    box.className = "scroll";
    const labels = new Map();
    for (const row of rows) {
      const { label } = groups[points.groups[row]];
      labels.set(label, (labels.get(label) ?? 0) + 1);
    }
    const parts = [...labels].sort((a, b) => b[1] - a[1]).slice(0, 5);
    chosen.replaceChildren(
      element("h2", `${rows.length.toLocaleString("en")} rows chosen`),
      element("p", parts.map(([label, number]) => `${label}: ${number}`).join(" · ")),
      box);
    chosen.dataset.rows = rows.length;
  });
}

function light(frame, table, points, found) {
  const places = new Map();
  document.getElementById("light").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const keys = await load("hits", { table, q: new FormData(event.target).get("q") });
      if (places.size === 0) points.keys.forEach((key, row) => places.set(key, row));
      const rows = keys.filter((key) => places.has(key)).map((key) => places.get(key));
      found.data = { x: rows.map((row) => points.x[row]), y: rows.map((row) => points.y[row]) };
      say(`${rows.length} of the ${keys.length} rows that were found are on the map.`);
      frame.dataset.lit = rows.length;
    } catch (error) {
      say(error.message, true);
    }
  });
}
