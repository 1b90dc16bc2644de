// Draws the figures of `CHARTS` when they come into view, in the colours of the page's theme.
"use strict";

const root = document.documentElement;
const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();

function themed(layout) {
  const axis = (own) => ({
    gridcolor: colour("--grid"), linecolor: colour("--grid"), zerolinecolor: colour("--grid"),
    automargin: true, ...own,
  });
  return {
    ...layout,
    xaxis: axis(layout.xaxis), yaxis: axis(layout.yaxis),
    height: 270, margin: { l: 48, r: 12, t: layout.showlegend ? 30 : 10, b: 38 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: colour("--font"), size: 12, color: colour("--muted") },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--text") } },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 }, entrywidth: 0, itemwidth: 30 },
  };
}

function draw(element) {
  const figure = CHARTS[Number(element.dataset.chart)];
  element.dataset.drawn = "yes";
  Plotly.react(element, figure.data, themed(figure.layout), { responsive: true, displaylogo: false, displayModeBar: false });
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }
}, { rootMargin: "600px" });

const elements = [...document.querySelectorAll("[data-chart]")];
elements.forEach((element) => seen.observe(element));

const redraw = () => elements.filter((element) => element.dataset.drawn).forEach(draw);
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", redraw);
document.getElementById("theme").addEventListener("click", () => {
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  root.dataset.theme = isDark ? "light" : "dark";
  redraw();
});
addEventListener("beforeprint", () => elements.forEach(draw));
