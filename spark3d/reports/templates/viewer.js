"use strict";
for (const viewer of document.querySelectorAll(".viewer")) {
  const { columns, rows, captions } = viewer.dataset;
  const texts = captions.split("|");
  const range = viewer.querySelector("input[type=range]");
  const layers = [...viewer.querySelectorAll(".layer")];
  const share = (index, count) => `${(100 * index) / Math.max(count - 1, 1)}%`;
  const show = (wanted) => {
    const slice = Math.min(Math.max(wanted, 0), texts.length - 1);
    range.value = slice;
    viewer.querySelector("output").textContent = texts[slice];
    const place = `${share(slice % columns, columns)} ${share(Math.floor(slice / columns), rows)}`;
    for (const layer of layers) layer.style.backgroundPosition = place;
  };
  range.addEventListener("input", () => show(Number(range.value)));
  viewer.querySelector(".stack").addEventListener("wheel", (event) => {
    event.preventDefault();
    show(Number(range.value) + Math.sign(event.deltaY));
  }, { passive: false });
  viewer.addEventListener("keydown", (event) => {
    const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1 }[event.key];
    if (!step || event.target.type === "range") return;
    event.preventDefault();
    show(Number(range.value) + step);
  });
  for (const box of viewer.querySelectorAll("input[type=checkbox]")) {
    const layer = layers.find((one) => one.dataset.name === box.value);
    box.addEventListener("change", () => layer.classList.toggle("off", !box.checked));
  }
}
