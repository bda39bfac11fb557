// Values under the pointer. The charts are complete without it.
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = JSON.parse(svg.dataset.chart), width = svg.viewBox.baseVal.width, height = svg.viewBox.baseVal.height;
  const line = document.createElementNS(svg.namespaceURI, "path"), tip = document.createElement("div");
  line.setAttribute("class", "pointer");
  tip.className = "tip";
  tip.hidden = true;
  svg.append(line);
  svg.parentNode.append(tip);
  const hide = () => { tip.hidden = true; line.removeAttribute("d"); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * width;
    if (x < chart.left - 4 || x > chart.right + 4) return hide();
    const step = chart.x0 + (x - chart.left) / (chart.right - chart.left) * (chart.x1 - chart.x0);
    const nearest = steps => steps.reduce((best, at, i) => Math.abs(at - step) < Math.abs(steps[best] - step) ? i : best, 0);
    tip.replaceChildren(...chart.series.map(series => {
      const i = nearest(series.x), row = document.createElement("div"), name = document.createElement("span");
      name.className = "key " + series.style.split(" ")[0];
      name.style.margin = 0;
      name.textContent = series.name;
      row.append(name, `${series.y[i]} at ${series.x[i]}`);
      return row;
    }));
    tip.hidden = false;
    const at = chart.left + (step - chart.x0) / (chart.x1 - chart.x0) * (chart.right - chart.left);
    line.setAttribute("d", `M${at.toFixed(1)} 8V${height - 34}`);
    const left = event.clientX - svg.parentNode.getBoundingClientRect().left;
    tip.style.left = Math.min(Math.max(left + 12, 4), svg.parentNode.clientWidth - tip.offsetWidth - 4) + "px";
    tip.style.top = "44px";
  });
}
