// Puts the report together from the embedded data. Errors are kept on the body, where a test can read them.

window.addEventListener("error", (event) => { document.body.dataset.error = event.message; });
window.addEventListener("unhandledrejection", (event) => { document.body.dataset.error = String(event.reason); });

function themeButton() {
  const root = document.documentElement;
  const stored = (() => { try { return localStorage.getItem("mask-grendel-theme"); } catch { return null; } })();
  if (stored) root.dataset.theme = stored;
  document.getElementById("theme-button").onclick = () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("mask-grendel-theme", root.dataset.theme); } catch { /* files may have no storage */ }
  };
}

function copyButtons() {
  for (const button of document.querySelectorAll("button.copy")) button.onclick = async () => {
    const text = button.parentElement.querySelector("code").textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "copied"; } catch { button.textContent = "select and copy"; }
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };
}

function phaseTooltips() {
  for (const bar of document.querySelectorAll(".stack div")) {
    bar.onpointermove = (event) => showTooltip(event.clientX, event.clientY, bar.dataset.name, [["", bar.dataset.value, ""]]);
    bar.onpointerleave = hideTooltip;
  }
}

(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  themeButton();
  copyButtons();
  phaseTooltips();
  for (const spec of data.charts) lineChart(document.getElementById("chart-" + spec.id), { ...spec, x_range: [0, data.last_iteration] });
  if (data.heat_map) heatMap(document.getElementById("chart-masks"), data.heat_map);
  compareViews(data.views);
  if (data.model) splatViewer(document.getElementById("space"), data.model).catch((error) => {
    document.getElementById("space-message").textContent = "The 3D view cannot be shown: " + error.message;
  });
  document.body.dataset.ready = "true";
})();
