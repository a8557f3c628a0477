"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const shown = new Set(data.runs.map((_, index) => index));
  const state = { smoothing: 0, log: false, filter: "" };
  const byId = (id) => document.getElementById(id);
  const on = (id, event, action) => byId(id) && byId(id).addEventListener(event, action);
  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text; // never as HTML: responses are a model's
    return made;
  };

  // Theme

  const root = document.documentElement;
  const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  try { chosen = localStorage.getItem("megarlhf-theme"); } catch { /* a browser that keeps nothing for files */ }
  const setTheme = () => {
    root.dataset.theme = chosen || (systemDark.matches ? "dark" : "light");
    byId("theme").textContent = root.dataset.theme === "dark" ? "Light" : "Dark";
    redraw();
  };
  on("theme", "click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("megarlhf-theme", chosen); } catch { /* as above */ }
    setTheme();
  });
  systemDark.addEventListener("change", setTheme);

  // Figures

  const smoothed = (values, weight) => {
    let sum = 0, mass = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = weight * sum + (1 - weight) * value;
      mass = weight * mass + (1 - weight);
      return sum / mass;
    });
  };
  const traces = (figure) => figure.data.flatMap((trace) => {
    const meta = trace.meta || {};
    if (meta.run !== undefined && !shown.has(meta.run)) return [];
    if (meta.runs) { // bars: one for each run
      const kept = meta.runs.map((run, at) => (shown.has(run) ? at : -1)).filter((at) => at >= 0);
      return kept.length ? [{ ...trace, x: kept.map((at) => trace.x[at]), y: kept.map((at) => trace.y[at]) }] : [];
    }
    if (!meta.smooth || !state.smoothing) return [trace];
    const faint = { ...trace, mode: "lines", opacity: 0.25, showlegend: false, hoverinfo: "skip", line: { ...trace.line, width: 1 } };
    return [faint, { ...trace, mode: "lines", y: smoothed(trace.y, state.smoothing) }];
  });
  const touched = window.matchMedia("(pointer: coarse)").matches; // there a finger moves the page, not the axes
  const layout = (figure) => {
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    const isCurve = figure.data.some((trace) => (trace.meta || {}).smooth);
    const axis = { gridcolor: colour("--grid"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true };
    const title = { text: figure.title, font: { size: 14 }, x: 0.02, xanchor: "left", y: 0.98, yanchor: "top" };
    // The legend lies in the margin above, whose height is reckoned here: a margin that plotly finds itself can swing to and fro.
    const named = figure.data.filter((trace) => trace.showlegend !== false).map((trace) => trace.name);
    const width = figure.plot.clientWidth - 60, longest = Math.max(...named.map((name) => name.length));
    const legendShown = figure.layout.showlegend ?? figure.data.length > 1;
    const rows = legendShown ? Math.ceil(named.length / Math.max(1, Math.floor(width / (46 + 6.2 * longest)))) : 0;
    const legend = {
      orientation: "h", x: 0, yref: "container", y: 1 - 30 / figure.plot.clientHeight, yanchor: "top", font: { size: 11 },
      traceorder: "normal", itemclick: false, itemdoubleclick: false,
    };
    return {
      showlegend: legendShown, hovermode: isCurve ? "x" : "closest", dragmode: touched ? false : "zoom", ...figure.layout, title, legend,
      xaxis: { ...axis, ...figure.layout.xaxis }, yaxis: { ...axis, ...figure.layout.yaxis, ...(isCurve && state.log ? { type: "log" } : {}) },
      paper_bgcolor: colour("--card"), plot_bgcolor: colour("--card"), font: { color: colour("--ink"), size: 12, family: "system-ui, sans-serif" },
      hoverlabel: { namelength: -1 }, margin: { l: 48, r: 14, t: 40 + 19 * rows, b: 36 }, modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    };
  };
  const config = (figure) => ({
    responsive: true, displaylogo: false, displayModeBar: true,
    modeBarButtons: [["zoom2d", "resetScale2d", "toImage"]],
    toImageButtonOptions: { format: "png", scale: 3, filename: figure.title.replace(/[^\w.-]+/g, "_") },
  });
  const draw = (figure) => Plotly.react(figure.plot, traces(figure), layout(figure), config(figure));
  const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
    const figure = data.figures[entry.target.dataset.figure];
    figure.visible = entry.isIntersecting;
    if (figure.visible && figure.stale) refresh(figure);
  }), { rootMargin: "600px" });
  const refresh = (figure) => {
    figure.stale = !figure.visible; // drawn when it comes into sight
    if (figure.visible) draw(figure);
  };
  const redraw = () => data.figures.forEach(refresh);
  const build = () => data.figures.forEach((figure, index) => {
    const place = document.querySelector(`.figures[data-group="${CSS.escape(figure.group)}"]`);
    figure.card = place.appendChild(element("div", "figure"));
    figure.plot = figure.card.appendChild(element("div", "plot"));
    const bars = Math.max(0, ...figure.data.map((trace) => ((trace.meta || {}).runs || []).length));
    if (bars > 4) figure.plot.style.height = `${150 + 28 * bars}px`;
    figure.plot.dataset.figure = index;
    figure.stale = true;
    if (figure.note) figure.card.append(element("p", "note", figure.note));
    seen.observe(figure.plot);
  });
  const filterFigures = () => {
    for (const figure of data.figures) figure.card.hidden = Boolean(figure.card.closest("#curves")) && !figure.title.includes(state.filter);
    for (const group of document.querySelectorAll(".group")) group.hidden = !group.querySelector(".figure:not([hidden])");
  };
  on("metric-filter", "input", (event) => { state.filter = event.target.value.trim(); filterFigures(); });
  on("smoothing", "input", (event) => {
    state.smoothing = Number(event.target.value);
    byId("smoothing-value").textContent = state.smoothing;
    redraw();
  });
  on("log", "change", (event) => { state.log = event.target.checked; redraw(); });

  // Runs

  for (const box of document.querySelectorAll("[data-toggle]")) {
    box.addEventListener("change", () => {
      const run = Number(box.dataset.toggle);
      if (box.checked) shown.add(run); else shown.delete(run);
      for (const part of document.querySelectorAll(`[data-run="${run}"]`)) part.hidden = !box.checked;
      redraw();
      listSamples();
    });
  }

  // Samples

  const PAGE = 10, NEWEST = 3;
  let length = PAGE;
  const rewards = (row) => row.answers.filter((answer) => shown.has(answer[0]) && answer[2] !== null).map((answer) => answer[2]);
  const low = (row) => Math.min(Infinity, ...rewards(row)), high = (row) => Math.max(-Infinity, ...rewards(row));
  const orders = { shared: null, low: (a, b) => low(a) - low(b) || 0, high: (a, b) => high(b) - high(a) || 0, apart: (a, b) => high(b) - low(b) - high(a) + low(a) || 0 };
  const marked = (text, words) => {
    const made = element("div", "text");
    const at = words ? text.toLowerCase().indexOf(words) : -1;
    if (at < 0) made.textContent = text || "(nothing)";
    else made.append(text.slice(0, at), element("mark", "", text.slice(at, at + words.length)), text.slice(at + words.length));
    return made;
  };
  const answerOf = ([run, step, reward, kl, finished, text], words) => {
    const made = element("div", "answer");
    made.style.setProperty("--run", data.runs[run].colour);
    const who = made.appendChild(element("div", "who"));
    who.append(element("b", "", data.runs[run].label));
    if (step !== null) who.append(` step ${step}`);
    if (reward !== null) who.append(" ", element("span", "reward", `reward ${reward.toFixed(2)}`));
    if (kl !== null) who.append(` KL ${kl.toFixed(2)}`);
    if (finished === false) who.append(" not finished");
    made.append(marked(text, words));
    return made;
  };
  const sampleOf = (row, words) => {
    const made = element("article", "sample");
    const prompt = made.appendChild(marked(row.prompt, words));
    prompt.className = "prompt";
    const answers = made.appendChild(element("div", "answers"));
    for (const run of shown) {
      const column = element("div", "column");
      const own = row.answers.filter((answer) => answer[0] === run);
      own.slice(0, NEWEST).forEach((answer) => column.append(answerOf(answer, words)));
      if (own.length > NEWEST) {
        const older = column.appendChild(element("details"));
        older.append(element("summary", "note", `${own.length - NEWEST} older`));
        own.slice(NEWEST).forEach((answer) => older.append(answerOf(answer, words)));
      }
      if (own.length) answers.append(column);
    }
    return made;
  };
  const listSamples = () => {
    const list = byId("sample-list");
    if (!list) return;
    const words = byId("search").value.trim().toLowerCase();
    const matches = (answer) => shown.has(answer[0]) && answer[5].toLowerCase().includes(words);
    const rows = data.samples.filter((row) => row.answers.some((answer) => shown.has(answer[0])) && (row.prompt.toLowerCase().includes(words) || row.answers.some(matches)));
    const order = orders[byId("order").value];
    if (order) rows.sort(order);
    list.replaceChildren(...rows.slice(0, length).map((row) => sampleOf(row, words)));
    byId("found").textContent = `${rows.length} prompt${rows.length === 1 ? "" : "s"}`;
    byId("more").hidden = rows.length <= length;
  };
  on("search", "input", () => { length = PAGE; listSamples(); });
  on("order", "change", () => { length = PAGE; listSamples(); });
  on("more", "click", () => { length += PAGE; listSamples(); });

  // Configuration

  const filterKeys = () => {
    const words = byId("key-filter").value.trim().toLowerCase();
    const only = byId("only-differences");
    for (const row of document.querySelectorAll("#configuration-table tbody tr")) {
      row.hidden = Boolean(only && only.checked && !row.classList.contains("differs")) || !row.textContent.toLowerCase().includes(words);
    }
  };
  on("key-filter", "input", filterKeys);
  on("only-differences", "change", filterKeys);

  build();
  setTheme();
  listSamples();
  filterKeys();
  root.dataset.ready = "yes";
})();
