// Draws the charts, which the page carries as plotly figures, in the colours of its light or dark scheme.
"use strict";
(() => {
  const { charts, said } = JSON.parse(document.getElementById("charts").textContent);
  const touch = window.matchMedia("(pointer: coarse)");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  function theme() {
    const style = getComputedStyle(document.body);
    const color = (name) => style.getPropertyValue(name).trim();
    const axis = () => ({ gridcolor: color("--line"), linecolor: color("--line"), zeroline: false, automargin: true,
                          tickfont: { size: 12 }, title: { font: { size: 13, color: color("--muted") } } });
    return {
      font: { family: style.fontFamily, size: 13, color: color("--text") },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 10, r: 10, t: 10, b: 10 }, xaxis: axis(), yaxis: axis(), hovermode: "closest",
      dragmode: touch.matches ? false : "zoom",  // on a phone a drag scrolls the page
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", tracegroupgap: 0 },
      hoverlabel: { bgcolor: color("--card"), bordercolor: color("--muted"), align: "left",
                    font: { family: style.fontFamily, color: color("--text"), size: 13 } },
    };
  }

  function draw(chart, choice) {
    const view = chart.views[choice ? choice.selectedIndex : 0];
    const base = theme();
    const layout = { ...base, ...view.layout };
    for (const axis of ["xaxis", "yaxis"]) {
      const title = { ...base[axis].title, ...view.layout[axis].title };
      layout[axis] = { ...base[axis], ...view.layout[axis], title };
    }
    const traces = view.data.map((trace) => ({
      hoverinfo: "text", ...trace, ...(trace.ids && { hovertext: trace.ids.map((id) => said[id]) }),
    }));
    Plotly.react(chart.id, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }

  for (const chart of charts) {
    const choice = document.getElementById(chart.id + "-view");
    draw(chart, choice);
    choice?.addEventListener("change", () => draw(chart, choice));
    dark.addEventListener("change", () => draw(chart, choice));
  }
})();
