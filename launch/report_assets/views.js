// Photo against render: the slider, the strip of thumbnails and the table of all measured views.

/** Wire the comparison of `views`; those without images are rows of the table only. */
function compareViews(views) {
  const pictured = views.filter((view) => view.photo);
  const rows = viewTable(views, (view) => show(view));
  const stage = document.getElementById("stage");
  if (!pictured.length || !stage) return;
  const strip = document.getElementById("strip");
  const thumbs = new Map(pictured.map((view) => [view, thumbnail(strip, view, () => show(view))]));
  const slide = slider(stage, Math.max(...pictured.map((view) => view.height / view.width)));
  let current = null;
  function show(view) {
    if (!view.photo) return;
    current = view;
    slide.show(view);
    document.getElementById("view-title").firstChild.textContent = view.image;
    document.getElementById("view-numbers").textContent = viewNumbers(view);
    for (const [one, button] of thumbs) button.setAttribute("aria-pressed", String(one === view));
    for (const [one, row] of rows) row.setAttribute("aria-selected", String(one === view));
    const button = thumbs.get(view);
    strip.scrollTo({ left: button.offsetLeft - strip.clientWidth / 2 + button.clientWidth / 2, behavior: "smooth" });
  }
  for (const button of document.querySelectorAll("#modes button")) button.onclick = () => {
    stage.dataset.mode = button.dataset.mode;
    for (const other of document.querySelectorAll("#modes button")) other.setAttribute("aria-pressed", String(other === button));
    document.getElementById("difference-scale").hidden = button.dataset.mode !== "difference";
  };
  stage.addEventListener("keydown", (event) => {
    const next = { ArrowDown: 1, PageDown: 1, ArrowUp: -1, PageUp: -1 }[event.key];
    if (next) { event.preventDefault(); show(pictured[(pictured.indexOf(current) + next + pictured.length) % pictured.length]); }
  });
  show(pictured.find((view) => view.badge === "best") || pictured[0]);
}

function viewNumbers(view) {
  const parts = [];
  if (view.psnr !== null) parts.push(view.psnr.toFixed(2) + " dB");
  if (view.ssim !== null) parts.push("SSIM " + view.ssim.toFixed(4));
  if (view.lpips !== null) parts.push("LPIPS " + view.lpips.toFixed(4));
  return parts.join(" · ");
}

function thumbnail(strip, view, onclick) {
  const button = html(strip, "button");
  button.type = "button";
  button.title = view.image;
  button.onclick = onclick;
  const image = html(button, "img");
  image.src = view.render;
  image.alt = view.image;
  if (view.psnr !== null) html(button, "span", view.badge || "", view.psnr.toFixed(1));
  return button;
}

/** The stage with both images, high enough for the tallest; the pointer or the arrow keys move the split. */
function slider(stage, tallest) {
  const frame = stage.querySelector(".frame");
  const images = ["photo", "render", "difference"].map((name) => frame.querySelector("." + name));
  let split = 50, aspect = 1;
  const set = (value) => {
    split = Math.max(0, Math.min(100, value));
    frame.style.setProperty("--split", split + "%");
    frame.setAttribute("aria-valuenow", String(Math.round(split)));
  };
  const fit = () => {
    stage.style.height = Math.max(220, Math.min(innerHeight * 0.66, 640, stage.clientWidth * tallest)) + "px";
    const height = Math.min(stage.clientHeight, stage.clientWidth / aspect);
    frame.style.width = height * aspect + "px";
    frame.style.height = height + "px";
  };
  const follow = (event) => {
    const rect = frame.getBoundingClientRect();
    set((event.clientX - rect.left) / rect.width * 100);
  };
  frame.onpointerdown = (event) => { if (event.isPrimary) { frame.setPointerCapture(event.pointerId); follow(event); } };
  frame.onpointermove = (event) => { if (event.buttons || event.pointerType === "mouse" && stage.dataset.mode === "slide") follow(event); };
  frame.onkeydown = (event) => {
    const step = { ArrowLeft: -2, ArrowRight: 2, Home: -100, End: 100 }[event.key];
    if (step) { event.preventDefault(); set(split + step); }
  };
  new ResizeObserver(() => requestAnimationFrame(fit)).observe(stage); // fit changes what is observed: not in its own callback
  set(50);
  return { show(view) {
    [images[0].src, images[1].src, images[2].src] = [view.photo, view.render, view.difference];
    images[0].alt = "photo of " + view.image;
    images[1].alt = "render of " + view.image;
    images[2].alt = "difference of photo and render of " + view.image;
    aspect = view.width / view.height;
    fit();
  } };
}

/** The rows of the table of views, sortable by every column; returns view -> row. */
function viewTable(views, choose) {
  const table = document.getElementById("view-table");
  const rows = new Map();
  if (!table) return rows;
  const body = table.tBodies[0];
  views.forEach((view, index) => rows.set(view, body.rows[index]));
  for (const [view, row] of rows) if (view.photo) {
    row.tabIndex = 0;
    row.onclick = () => choose(view);
    row.onkeydown = (event) => { if (event.key === "Enter") choose(view); };
  }
  for (const header of table.tHead.rows[0].cells) header.querySelector("button").onclick = () => {
    const key = header.dataset.key, down = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const order = [...rows].sort(([a], [b]) => (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0) * (down ? -1 : 1));
    body.append(...order.map(([, row]) => row));
  };
  return rows;
}
