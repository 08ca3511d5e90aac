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
  const table = frame.dataset.table;
  // The points come while Plotly is still on its way.
  const [{ groups, projection, rows, command }] = await Promise.all(
    [load("points", { table }), script("plotly")]);
  for (const group of groups) {
    group.x = floats(group.x);
    group.y = floats(group.y);
  }
  const count = groups.reduce((sum, group) => sum + group.keys.length, 0);
  if (count === 0) return say(`The rows have no places yet. This makes them: ${command}`);
  // A group for each cluster draws far faster than a colour for each row.
  const size = Math.max(2.5, Math.min(7, 500 / Math.sqrt(count)));
  const traces = groups.map((group) => trace(group, { color: group.colour, size, opacity: 0.75 }));
  const ink = getComputedStyle(document.body).color;
  const lit = { color: "#e11d48", size: size + 7, symbol: "star", line: { width: 1, color: ink } };
  traces.push({ ...trace({ label: "found", x: [], y: [] }, lit), showlegend: false });
  // Its keys change with each question.
  const shown = [...groups, { keys: [] }];
  // Places are in the unit square, so nobody has to look for their range.
  const axis = { visible: false, fixedrange: false, range: [-0.02, 1.02] };
  const wide = frame.clientWidth > 760;
  await Plotly.newPlot(frame, traces, {
    dragmode: "lasso", hovermode: "closest", hoverdistance: 12, margin: { l: 8, r: 8, t: 8, b: 8 },
    xaxis: axis, yaxis: { ...axis, scaleanchor: "x" }, showlegend: wide,
    legend: { itemsizing: "constant", bgcolor: "rgba(0,0,0,0)" }, font: { color: ink, size: 11 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  }, { displayModeBar: false, scrollZoom: true, responsive: true });
  say(`${count.toLocaleString("en")} of ${rows.toLocaleString("en")} rows, by ${projection}.`);
  frame.dataset.rows = count;
  hover(frame, table, shown);
  lasso(frame, table, groups);
  light(frame, table, shown);
}

function script(id) {
  const tag = document.getElementById(id);
  return window.Plotly ? undefined : new Promise((done, failed) => {
    tag.addEventListener("load", done);
    tag.addEventListener("error", () => failed(new Error("Plotly could not be loaded.")));
  });
}

function floats(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

function trace(group, marker) {
  const name = group.label.length > 32 ? `${group.label.slice(0, 31)}…` : group.label;
  // Plotly reads some markup in names; a name is only ever a name.
  const plain = name.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  return { type: "scattergl", mode: "markers", x: group.x, y: group.y,
           name: plain, marker, hoverinfo: "none" };
}

function hover(frame, table, shown) {
  const tip = document.getElementById("tip");
  let wanted = null;
  frame.on("plotly_hover", async ({ points, event }) => {
    const key = (wanted = shown[points[0].curveNumber].keys[points[0].pointNumber]);
    const [found] = await load("rows", { table, key });
    if (wanted !== key || !found) return;
    tip.replaceChildren(...Object.entries(found.row).filter(([, value]) => value !== null)
      .map(([name, value]) => element("p", "", element("small", `${name} `), String(value))));
    tip.hidden = false;
    const x = Math.min(event.pageX + 14, document.body.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(4, x)}px`;
    tip.style.top = `${event.pageY + 14}px`;
  });
  frame.on("plotly_unhover", () => { wanted = null; tip.hidden = true; });
}

function lasso(frame, table, groups) {
  const chosen = document.getElementById("chosen");
  frame.on("plotly_selected", async (selected) => {
    // What a question lit up lies above its own row, which is the one that counts.
    const points = (selected?.points ?? []).filter((point) => point.curveNumber < groups.length);
    const keys = points.map((point) => groups[point.curveNumber].keys[point.pointNumber]);
    if (keys.length === 0) return chosen.replaceChildren();
    // A head of a request has its bound, and nobody reads more.
    const query = [["table", table]];
    for (const key of keys.slice(0, 50)) query.push(["key", key]);
    const rows = await load("rows", query);
    const names = Object.keys(rows[0]?.row ?? {});
    const head = element("tr", "", ...names.map((name) => element("th", name)));
    const body = rows.map(({ row }) =>
      element("tr", "", ...names.map((name) => element("td", String(row[name] ?? "").slice(0, 300)))));
    const box = element("div", "", element("table", "", head, ...body));
    box.className = "scroll";
    const labels = new Map();
    for (const { curveNumber } of points) {
      const { label } = groups[curveNumber];
      labels.set(label, (labels.get(label) ?? 0) + 1);
    }
    const parts = [...labels].sort((a, b) => b[1] - a[1]).slice(0, 5);
    chosen.replaceChildren(
      element("h2", `${keys.length.toLocaleString("en")} rows chosen`),
      element("p", parts.map(([label, number]) => `${label}: ${number}`).join(" · ")),
      box);
    chosen.dataset.rows = keys.length;
  });
}

function light(frame, table, shown) {
  const last = shown.length - 1;
  const places = new Map();
  document.getElementById("light").addEventListener("submit", async (event) => {
    event.preventDefault();
    try {
      const keys = await load("hits", { table, q: new FormData(event.target).get("q") });
      for (const group of places.size ? [] : shown.slice(0, last)) {
        group.keys.forEach((key, i) => places.set(key, [group.x[i], group.y[i]]));
      }
      const there = keys.filter((key) => places.has(key));
      await Plotly.restyle(frame, {
        x: [there.map((key) => places.get(key)[0])], y: [there.map((key) => places.get(key)[1])],
      }, [last]);
      shown[last].keys = there;
      say(`${there.length} of the ${keys.length} rows that were found are on the map.`);
      frame.dataset.lit = there.length;
    } catch (error) {
      say(error.message, true);
    }
  });
}
