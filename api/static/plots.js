// Draws the figures that the server put into data-figure attributes, in the colours of the stylesheet. Redraws when the data or the theme changes.
"use strict";

(() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const CONFIG = { displaylogo: false, responsive: true, modeBarButtons: [["toImage", "resetScale2d"]] };
  const KINDS = {
    sampler: { name: "proposed", symbol: "circle" },
    anchor: { name: "anchor", symbol: "square" },
    user: { name: "yours", symbol: "diamond" },
    control: { name: "random control", symbol: "x" },
  };

  const title = (text) => ({ text, font: { size: 12 } });
  function layout(extra) {
    const axis = { gridcolor: colour("line"), linecolor: colour("strong-line"), zerolinecolor: colour("line"), automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 14, t: 12, b: 44 }, hovermode: "closest",
      font: { family: "system-ui, sans-serif", size: 12, color: colour("text") }, uirevision: "keep",
      hoverlabel: { bgcolor: colour("card"), bordercolor: colour("strong-line"), font: { color: colour("text") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("strong-line"), activecolor: colour("accent") },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      ...extra, xaxis: { ...axis, ...extra.xaxis }, yaxis: { ...axis, ...extra.yaxis },
    };
  }
  const vertical = (x, dash) => ({ type: "line", x0: x, x1: x, yref: "paper", y0: 0, y1: 1, line: { color: colour("faint"), width: 1.5, dash } });

  function score(figure) {
    if (!figure.points.length) return empty(figure.empty);
    const traces = [];
    const front = figure.points.filter((point) => point.pareto).sort((a, b) => a.x - b.x);
    if (figure.is_front_drawn && front.length > 1) {
      traces.push({ x: front.map((p) => p.x), y: front.map((p) => p.y), mode: "lines", name: "Pareto front", hoverinfo: "skip", line: { color: colour("data-pareto"), width: 2, dash: "dot" } });
    }
    const tied = figure.points.filter((point) => point.tied);
    if (tied.length) {
      traces.push({ x: tied.map((p) => p.x), y: tied.map((p) => p.y), mode: "markers", name: "tied for first", hoverinfo: "skip", marker: { size: 19, symbol: "circle-open", color: colour("text"), line: { width: 1.2 } } });
    }
    for (const [kind, { name, symbol }] of Object.entries(KINDS)) {
      const points = figure.points.filter((point) => point.kind === kind && !point.winner);
      if (points.length) traces.push(markers(figure, points, { name, symbol, size: 9, color: colour(`data-${kind}`) }));
    }
    const winner = figure.points.filter((point) => point.winner);
    if (winner.length) {
      traces.push(markers(figure, winner, { name: figure.leader, symbol: "star", size: 16, color: colour(`data-${winner[0].kind}`), line: { width: 1.2, color: colour("text") } }));
    }
    // The teacher costs far more than any shape: where it stands on that axis would leave them little of it.
    const shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: colour("data-teacher"), width: 1.5, dash: "dot" } }];
    const annotations = [{ xref: "paper", x: 0, y: 1, yanchor: "bottom", xanchor: "left", xshift: 4, showarrow: false, text: figure.teacher ? `teacher, ${figure.teacher.toLocaleString("en")}` : "teacher", font: { color: colour("faint"), size: 12 } }];
    if (figure.budget) {
      shapes.push(vertical(figure.budget, "dash"));
      annotations.push({ x: figure.budget, yref: "paper", y: 1, yanchor: "top", xanchor: "left", xshift: 4, showarrow: false, text: "budget", font: { color: colour("faint"), size: 12 } });
    }
    return [traces, layout({ xaxis: { title: title(figure.cost), exponentformat: "SI" }, yaxis: { title: title("score (teacher 1, random weights 0)") }, shapes, annotations })];
  }

  const markers = (figure, points, { name, color, ...marker }) => ({
    x: points.map((p) => p.x), y: points.map((p) => p.y), customdata: points.map((p) => p.url), text: points.map((p) => p.label), mode: "markers", name,
    error_y: { type: "data", array: points.map((p) => p.error ?? 0), color, thickness: 1.2, width: 3 }, marker: { color, ...marker },
    hovertemplate: `%{text}<br>score %{y:.3f} ± %{error_y.array:.3f}<br>${figure.cost} %{x:,}<extra></extra>`,
  });
  const empty = (text) => [[], layout({ xaxis: { visible: false }, yaxis: { visible: false }, annotations: [note(text)] })];
  const note = (text) => ({ xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, text, font: { size: 14, color: colour("faint") } });

  function rungs(figure) {
    if (!figure.lines.length) return empty(figure.empty);
    const traces = figure.lines.map((line) => ({
      x: line.x, y: line.y, text: line.x.map(() => line.label), mode: "lines+markers", showlegend: false, opacity: line.winner ? 1 : 0.55,
      line: { color: colour(`data-${line.kind}`), width: line.winner ? 3.5 : 1.3 }, marker: { size: line.winner ? 8 : 5, symbol: KINDS[line.kind].symbol },
      hovertemplate: "%{text}<br>KL %{y:.3f}<extra></extra>",
    }));
    const ticks = figure.rungs.map((_, index) => index);
    return [traces, layout({
      xaxis: { title: title("tokens distilled on"), tickvals: ticks, ticktext: figure.rungs, range: [-0.2, figure.rungs.length - 0.75] },
      yaxis: { title: title("KL to the teacher, nats per token"), type: "log" },
    })];
  }

  function curve(figure) {
    if (!figure.x.length && !figure.rungs.length) return empty(figure.empty);
    const traces = [{ x: figure.x, y: figure.y, mode: "lines", connectgaps: false, name: "distillation loss (training)", line: { color: colour("data-sampler"), width: 1.6 }, hovertemplate: "%{x:,} tokens<br>KL %{y:.4f}<extra></extra>" }];
    if (figure.rungs.length) {
      traces.push({ x: figure.rungs.map((r) => r.tokens), y: figure.rungs.map((r) => r.kl), text: figure.rungs.map((r) => `rung ${r.rung}`), mode: "markers", cliponaxis: false, name: "held-out KL at the end of a rung",
        marker: { size: 11, symbol: "diamond", color: colour("data-anchor") }, hovertemplate: "%{text}, %{x:,} tokens<br>held-out KL %{y:.4f}<extra></extra>" });
    }
    const shapes = figure.rungs.filter((r) => r.tokens > 0).map((r) => vertical(r.tokens, "dot"));
    return [traces, layout({ xaxis: { title: title("tokens"), exponentformat: "SI", rangemode: "tozero" }, yaxis: { title: title("KL to the teacher, nats per token"), type: "log" }, shapes })];
  }

  const FIGURES = { score, rungs, curve };
  window.nasDraw = (element) => {
    const figure = JSON.parse(element.dataset.figure);
    const [traces, shape] = FIGURES[figure.kind](figure);
    element.querySelector(".placeholder")?.remove();
    const isNew = element.dataset.drawn === undefined;
    element.dataset.drawn = "";
    Plotly.react(element, traces, shape, CONFIG);
    if (isNew) element.on("plotly_click", (click) => { const url = click.points[0]?.customdata; if (url) location.href = url; });
  };
  const drawAll = () => document.querySelectorAll("[data-figure]").forEach(window.nasDraw);
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
})();
