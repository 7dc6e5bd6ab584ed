// Paints which pixels are to be filled in. Gradio gives element, props and watch.
// props.value: {image: URL, width, height, fill}; fill is "0" or "1" a pixel, row by row.
const canvas = element.querySelector("canvas");
const brush = element.querySelector("input[type=range]");
const erase = element.querySelector("input[type=checkbox]");
const pen = canvas.getContext("2d");
const picture = new Image();
let fill = [], scale = 1, from = null, erasing = false;

function draw() {
  const { width, height } = props.value;
  pen.imageSmoothingEnabled = false;
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (picture.complete && picture.naturalWidth) pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  pen.fillStyle = "rgba(230, 60, 40, 0.65)";
  for (let i = 0; i < width * height; i++)
    if (fill[i]) pen.fillRect((i % width) * scale, Math.floor(i / width) * scale, scale, scale);
}

function show() {
  const value = props.value || {};
  element.querySelector(".mask").hidden = !value.width;
  if (!value.width) return;
  const { width, height } = value;
  scale = Math.max(1, Math.floor(420 / Math.max(width, height)));
  canvas.width = width * scale;
  canvas.height = height * scale;
  brush.max = Math.ceil(Math.max(width, height) / 2);
  if (!brush.dataset.set) brush.value = Math.max(1, Math.round(Math.max(width, height) / 8));
  brush.dataset.set = "yes";
  fill = Array.from({ length: width * height }, (_, i) => value.fill?.[i] === "1");
  picture.src = value.image;
  draw();
}

// The pixel, with fractions, that the pointer is over.
function place(event) {
  const box = canvas.getBoundingClientRect();
  return [((event.clientX - box.left) / box.width) * props.value.width,
          ((event.clientY - box.top) / box.height) * props.value.height];
}

function dab([x, y]) {
  const { width, height } = props.value, r = brush.value / 2;
  for (let j = 0; j < height; j++)
    for (let i = 0; i < width; i++)
      if (Math.hypot(i + 0.5 - x, j + 0.5 - y) <= r || (i === Math.floor(x) && j === Math.floor(y)))
        fill[j * width + i] = !erasing;
}

function line(to) {
  const n = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - from[0], to[1] - from[1])));
  for (let k = 1; k <= n; k++) dab([0, 1].map((a) => from[a] + ((to[a] - from[a]) * k) / n));
  from = to;
  draw();
}

function tell() {
  props.value = { ...props.value, fill: fill.map((f) => (f ? "1" : "0")).join("") };
}

canvas.addEventListener("pointerdown", (event) => {
  if (event.button > 0 && event.button !== 2) return;
  erasing = erase.checked || event.button === 2;
  canvas.setPointerCapture(event.pointerId);
  from = place(event);
  line(from);
});
canvas.addEventListener("pointermove", (event) => from && line(place(event)));
for (const end of ["pointerup", "pointercancel"])
  canvas.addEventListener(end, () => {
    if (from) tell();
    from = null;
  });
canvas.addEventListener("contextmenu", (event) => event.preventDefault());
element.querySelector("button").addEventListener("click", () => {
  fill.fill(false);
  draw();
  tell();
});
picture.addEventListener("load", draw);
watch("value", () => from || show());
show();
