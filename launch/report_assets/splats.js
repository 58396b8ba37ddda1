// The 3D pane: a WebGL2 viewer of anisotropic Gaussians, sorted back to front, without any library.
//
// A pixel gets 3DGS's image formation: J W S W^T J^T + 0.3 pixels^2, alpha = opacity * exp(-d^2 / 2) up to 0.99, nothing below 1/255.
// The low-pass of 0.3 pixels^2 grows with the zoom beyond the resolution the model was trained at, so that splats keep covering.

const TEXELS = 3; // RGBA32UI texels per splat: centre and colour, covariance (6 numbers), spare
const TEXTURE_WIDTH = 682 * TEXELS;

const VERTEX_SHADER = `#version 300 es
precision highp float;
precision highp int;
uniform highp usampler2D u_splats;
uniform mat3 u_rotation;      // world to camera
uniform vec3 u_position;      // of the camera
uniform vec2 u_focal;         // pixels
uniform vec2 u_viewport;      // pixels
uniform float u_low_pass;     // pixels^2
uniform float u_size;         // 1: as trained
uniform float u_near;
uniform bool u_antialiased;   // the model was trained with opacities scaled for the low-pass
in vec2 a_corner;
in uint a_splat;
out vec2 v_offset;
out vec4 v_color;
void main() {
  int first = int(a_splat) * ${TEXELS};
  ivec2 place = ivec2(first % ${TEXTURE_WIDTH}, first / ${TEXTURE_WIDTH});
  uvec4 t0 = texelFetch(u_splats, place, 0);
  vec4 t1 = uintBitsToFloat(texelFetch(u_splats, place + ivec2(1, 0), 0));
  vec4 t2 = uintBitsToFloat(texelFetch(u_splats, place + ivec2(2, 0), 0));
  vec3 center = u_rotation * (uintBitsToFloat(t0.xyz) - u_position);
  gl_Position = vec4(0.0, 0.0, 2.0, 1.0); // clipped
  if (center.z < u_near) return;
  vec4 color = vec4(uvec4(t0.w, t0.w >> 8, t0.w >> 16, t0.w >> 24) & 255u) / 255.0;
  vec2 limit = 0.65 * u_viewport / u_focal;
  vec2 slope = clamp(center.xy / center.z, -limit, limit);
  vec3 jx = vec3(u_focal.x, 0.0, -u_focal.x * slope.x) / center.z * u_rotation;
  vec3 jy = vec3(0.0, u_focal.y, -u_focal.y * slope.y) / center.z * u_rotation;
  mat3 covariance = u_size * u_size * mat3(t1.x, t1.y, t1.z, t1.y, t1.w, t2.x, t1.z, t2.x, t2.y);
  float a = dot(jx, covariance * jx) + u_low_pass, b = dot(jx, covariance * jy), c = dot(jy, covariance * jy) + u_low_pass;
  float middle = 0.5 * (a + c), reach = length(vec2(0.5 * (a - c), b));
  float major = middle + reach, minor = max(middle - reach, 0.5 * u_low_pass);
  if (u_antialiased) {
    float before = (a - u_low_pass) * (c - u_low_pass) - b * b;
    color.a *= sqrt(clamp(before / (a * c - b * b), 0.0, 1.0));
  }
  vec2 axis = abs(b) < 1e-6 * middle ? (a >= c ? vec2(1, 0) : vec2(0, 1)) : normalize(vec2(b, major - a));
  float extent = sqrt(2.0 * log(max(255.0 * color.a, 1.0)));
  vec2 point = center.xy / center.z * u_focal;
  vec2 bound = 0.5 * u_viewport + extent * sqrt(major);
  if (extent == 0.0 || any(greaterThan(abs(point), bound))) return;
  v_offset = a_corner * extent;
  v_color = color;
  point += v_offset.x * sqrt(major) * axis + v_offset.y * sqrt(minor) * vec2(-axis.y, axis.x);
  gl_Position = vec4(2.0 * point.x / u_viewport.x, -2.0 * point.y / u_viewport.y, 0.0, 1.0);
}`;

const FRAGMENT_SHADER = `#version 300 es
precision highp float;
in vec2 v_offset;
in vec4 v_color;
out vec4 pixel;
void main() {
  float alpha = min(0.99, v_color.a * exp(-0.5 * dot(v_offset, v_offset)));
  if (alpha < 1.0 / 255.0) discard;
  pixel = vec4(v_color.rgb * alpha, alpha);
}`;

// ---- vectors and rotations; a rotation is the camera's axes [right, down, forward] in the world

const add = (a, b, scale = 1) => [a[0] + scale * b[0], a[1] + scale * b[1], a[2] + scale * b[2]];
const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const scaled = (a, factor) => [a[0] * factor, a[1] * factor, a[2] * factor];
const unit = (a) => scaled(a, 1 / (Math.hypot(...a) || 1));

/** `vector` turned about the unit `axis` by `angle` (Rodrigues). */
function turned(vector, axis, angle) {
  const cosine = Math.cos(angle), sine = Math.sin(angle);
  return add(add(scaled(vector, cosine), cross(axis, vector), sine), axis, dot(axis, vector) * (1 - cosine));
}

/** Axes made orthonormal again, forward kept. */
function orthonormal([right, , forward]) {
  const f = unit(forward), r = unit(add(right, f, -dot(right, f)));
  return [r, cross(f, r), f];
}

/** The pose between two poses; rotations by blending the axes, fine for neighbouring cameras. */
function between(a, b, share) {
  const mix = (p, q) => add(scaled(p, 1 - share), q, share);
  return { position: mix(a.position, b.position), axes: orthonormal([mix(a.axes[0], b.axes[0]), null, mix(a.axes[2], b.axes[2])]) };
}

// ---- data

/** The bytes of the embedded model: base64 of gzip. */
async function embeddedBytes() {
  const text = atob(document.getElementById("splat-data").textContent.trim());
  const packed = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  if (!("DecompressionStream" in window)) throw new Error("this browser is too old to unpack the model");
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Unpack planes of bytes into centres (for sorting) and texture words; the format is in launch/report_splats.py. */
function unpackSplats(bytes, model) {
  const count = model.num_shown, rows = Math.ceil(count * TEXELS / TEXTURE_WIDTH);
  const words = new Uint32Array(rows * TEXTURE_WIDTH * 4), floats = new Float32Array(words.buffer);
  const centers = new Float32Array(count * 3);
  const plane = (index) => bytes.subarray(index * count, (index + 1) * count);
  const low = [0, 2, 4].map(plane), high = [1, 3, 5].map(plane), scale = [6, 7, 8].map(plane), quat = [9, 10, 11, 12].map(plane);
  const color = [13, 14, 15, 16].map(plane);
  for (let i = 0; i < count; i++) {
    const q = low.map((bytesOfAxis, axis) => (bytesOfAxis[i] + 256 * high[axis][i]) / 65535 * 4 - 2);
    const length = Math.hypot(...q), stretch = length > 1 ? 1 / (length * Math.max(2 - length, 1e-4)) : 1;
    const base = i * TEXELS * 4;
    for (let axis = 0; axis < 3; axis++) floats[base + axis] = centers[3 * i + axis] = model.center[axis] + q[axis] * stretch * model.radius;
    words[base + 3] = (color[0][i] | color[1][i] << 8 | color[2][i] << 16 | color[3][i] << 24) >>> 0;
    floats.set(covariance(scale.map((values) => Math.exp(model.log_scale[0] + values[i] / 255 * (model.log_scale[1] - model.log_scale[0]))),
      quat.map((values) => values[i] - 128)), base + 4);
  }
  return { count, centers, words, rows };
}

/** Upper triangle of R diag(scale^2) R^T for a quaternion w, x, y, z of any length. */
function covariance(scale, quaternion) {
  const norm = Math.hypot(...quaternion) || 1, [w, x, y, z] = quaternion.map((value) => value / norm);
  const r = [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
    2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)];
  const sum = (i, j) => [0, 1, 2].reduce((total, k) => total + r[3 * i + k] * r[3 * j + k] * scale[k] * scale[k], 0);
  return [sum(0, 0), sum(0, 1), sum(0, 2), sum(1, 1), sum(1, 2), sum(2, 2)];
}

/** Splat numbers from far to near along `forward`: a counting sort over 65536 depths. */
function depthOrder(centers, count, forward, buffers) {
  const { depths, keys, starts, order } = buffers;
  let low = Infinity, high = -Infinity;
  for (let i = 0; i < count; i++) {
    const depth = centers[3 * i] * forward[0] + centers[3 * i + 1] * forward[1] + centers[3 * i + 2] * forward[2];
    depths[i] = depth;
    if (depth < low) low = depth;
    if (depth > high) high = depth;
  }
  const factor = 65535 / (high - low || 1);
  starts.fill(0);
  for (let i = 0; i < count; i++) { keys[i] = (high - depths[i]) * factor; starts[keys[i] + 1]++; }
  for (let i = 0; i < 65536; i++) starts[i + 1] += starts[i];
  for (let i = 0; i < count; i++) order[starts[keys[i]]++] = i;
  return order;
}

// ---- drawing

function compileProgram(gl) {
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX_SHADER], [gl.FRAGMENT_SHADER, FRAGMENT_SHADER]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    if (!gl.getShaderParameter(shader, gl.COMPILE_STATUS)) throw new Error(gl.getShaderInfoLog(shader));
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
  return program;
}

/** Uploads the model; returns draw(pose, size): sorts when the direction changed, and paints the canvas. */
function splatPainter(canvas, splats, model) {
  const gl = canvas.getContext("webgl2", { antialias: false, alpha: false, preserveDrawingBuffer: true });
  if (!gl) throw new Error("this browser has no WebGL 2");
  const program = compileProgram(gl);
  gl.useProgram(program);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
  gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32UI, TEXTURE_WIDTH, splats.rows, 0, gl.RGBA_INTEGER, gl.UNSIGNED_INT, splats.words);
  const corner = gl.getAttribLocation(program, "a_corner"), splat = gl.getAttribLocation(program, "a_splat");
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
  gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
  gl.enableVertexAttribArray(corner);
  gl.vertexAttribPointer(corner, 2, gl.FLOAT, false, 0, 0);
  gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer()); // stays bound: the order of the splats
  gl.bufferData(gl.ARRAY_BUFFER, 4 * splats.count, gl.DYNAMIC_DRAW);
  gl.enableVertexAttribArray(splat);
  gl.vertexAttribIPointer(splat, 1, gl.UNSIGNED_INT, 0, 0);
  gl.vertexAttribDivisor(splat, 1);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  gl.clearColor(...model.background, 1);
  const uniform = (name) => gl.getUniformLocation(program, name);
  const at = Object.fromEntries(["rotation", "position", "focal", "viewport", "low_pass", "size", "near", "antialiased"].map((name) => [name, uniform("u_" + name)]));
  const buffers = { depths: new Float32Array(splats.count), keys: new Uint16Array(splats.count), starts: new Uint32Array(65537), order: new Uint32Array(splats.count) };
  let sorted = [0, 0, 0];
  return (pose, lens, size) => {
    const [right, down, forward] = pose.axes;
    if (dot(forward, sorted) < 0.99995) {
      gl.bufferSubData(gl.ARRAY_BUFFER, 0, depthOrder(splats.centers, splats.count, forward, buffers));
      sorted = forward;
    }
    const zoom = Math.min(canvas.width / lens.width, canvas.height / lens.height);
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.uniformMatrix3fv(at.rotation, true, [...right, ...down, ...forward]);
    gl.uniform3fv(at.position, pose.position);
    gl.uniform2f(at.focal, lens.fx * zoom, lens.fy * zoom);
    gl.uniform2f(at.viewport, canvas.width, canvas.height);
    gl.uniform1f(at.low_pass, 0.3 * Math.max(1, zoom * zoom));
    gl.uniform1f(at.size, size);
    gl.uniform1f(at.near, 0.02 * model.radius);
    gl.uniform1i(at.antialiased, model.antialiased ? 1 : 0);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, splats.count);
  };
}

// ---- moving

/** Where a camera of the data set stands and looks, with the point that dragging turns about. */
function poseOf(camera, model) {
  const axes = [0, 1, 2].map((column) => camera.rotation.map((row) => row[column]));
  const ahead = dot(add(model.center, camera.position, -1), axes[2]);
  return { position: camera.position, axes, target: add(camera.position, axes[2], Math.max(ahead, 0.4 * model.radius)) };
}

/** The same view turned about its target: `sideways` about the scene's up direction, `upwards` about the camera's right. */
function orbited(pose, up, sideways, upwards) {
  let offset = add(pose.position, pose.target, -1), axes = pose.axes;
  const turn = (axis, angle) => { offset = turned(offset, axis, angle); axes = axes.map((one) => turned(one, axis, angle)); };
  turn(up, sideways);
  const height = dot(axes[2], up); // -1: straight down
  if (!(height < -0.985 && upwards < 0) && !(height > 0.985 && upwards > 0)) turn(axes[0], upwards);
  return { position: add(pose.target, offset), axes: orthonormal(axes), target: pose.target };
}

/** Pointer, wheel and key handlers of the canvas; `state.pose` is replaced and `changed` called. */
function steer(canvas, state, model, changed) {
  const pointers = new Map();
  const distance = () => Math.hypot(...add(state.pose.position, state.pose.target, -1));
  const orbit = (dx, dy) => { state.pose = orbited(state.pose, model.up, -dx * 0.006, -dy * 0.006); changed(); };
  const pan = (dx, dy) => {
    const step = distance() / Math.min(state.lens.fx / state.lens.width * canvas.clientWidth, state.lens.fy / state.lens.height * canvas.clientHeight);
    const move = add(scaled(state.pose.axes[0], -dx * step), state.pose.axes[1], -dy * step);
    state.pose = { ...state.pose, position: add(state.pose.position, move), target: add(state.pose.target, move) };
    changed();
  };
  const zoom = (factor) => {
    const offset = add(state.pose.position, state.pose.target, -1);
    if (factor < 1 && distance() * factor < 0.03 * model.radius) return;
    state.pose = { ...state.pose, position: add(state.pose.target, offset, factor) };
    changed();
  };
  canvas.onpointerdown = (event) => { canvas.setPointerCapture(event.pointerId); pointers.set(event.pointerId, [event.clientX, event.clientY]); state.stop(); };
  canvas.onpointerup = canvas.onpointercancel = (event) => { pointers.delete(event.pointerId); };
  canvas.onpointermove = (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const dx = event.clientX - before[0], dy = event.clientY - before[1];
    if (pointers.size === 1) {
      if (event.buttons & 2 || event.shiftKey) pan(dx, dy); else orbit(dx, dy);
    } else {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
      const old = Math.hypot(before[0] - other[0], before[1] - other[1]), now = Math.hypot(event.clientX - other[0], event.clientY - other[1]);
      zoom(old / (now || 1));
      pan(dx / 2, dy / 2);
    }
    pointers.set(event.pointerId, [event.clientX, event.clientY]);
  };
  canvas.oncontextmenu = (event) => event.preventDefault();
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas && !event.ctrlKey) return; // the page scrolls until the pane was clicked
    event.preventDefault();
    state.stop();
    zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.0022));
  }, { passive: false });
  const keys = { ArrowLeft: () => orbit(-16, 0), ArrowRight: () => orbit(16, 0), ArrowUp: () => orbit(0, -16), ArrowDown: () => orbit(0, 16),
    a: () => pan(24, 0), d: () => pan(-24, 0), w: () => zoom(0.93), s: () => zoom(1 / 0.93), q: () => pan(0, 24), e: () => pan(0, -24) };
  canvas.onkeydown = (event) => {
    const action = event.ctrlKey || event.metaKey ? null : keys[event.key];
    if (action) { event.preventDefault(); state.stop(); action(); }
  };
}

/** Fill the pane with the model: drawing, steering, the list of cameras, the tour through them, the size slider. */
async function splatViewer(pane, model) {
  const canvas = pane.querySelector("canvas");
  const splats = unpackSplats(await embeddedBytes(), model);
  const paint = splatPainter(canvas, splats, model);
  document.getElementById("space-message").hidden = true;
  const state = { pose: null, lens: null, size: 1, tour: 0, stop: () => {} };
  let queued = false;
  const changed = () => { if (!queued) { queued = true; requestAnimationFrame(() => { queued = false; paint(state.pose, state.lens, state.size); }); } };
  const look = (camera) => { state.pose = poseOf(camera, model); state.lens = camera; changed(); };
  new ResizeObserver(() => {
    const density = Math.min(devicePixelRatio || 1, 2);
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * density));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * density));
    if (state.pose) paint(state.pose, state.lens, state.size);
  }).observe(canvas);
  const list = document.getElementById("space-cameras");
  for (const camera of model.cameras) html(list, "option", "", camera.name);
  list.onchange = () => { state.stop(); look(model.cameras[list.selectedIndex]); };
  document.getElementById("space-size").oninput = (event) => { state.size = Number(event.target.value); changed(); };
  document.getElementById("space-full").onclick = () => document.fullscreenElement ? document.exitFullscreen() : pane.requestFullscreen();
  steer(canvas, state, model, changed);
  canvas.addEventListener("pointerdown", () => { document.getElementById("space-hint").style.opacity = 0; });
  tour(state, model, changed);
  list.selectedIndex = model.first_camera;
  look(model.cameras[model.first_camera]);
}

/** The button that flies from camera to camera in the order of their names, and back again. */
function tour(state, model, changed) {
  const button = document.getElementById("space-tour");
  const stops = model.tour.map((index) => poseOf(model.cameras[index], model));
  button.hidden = stops.length < 2;
  let frame = 0;
  state.stop = () => { cancelAnimationFrame(frame); frame = 0; button.textContent = "▶ Tour"; };
  button.onclick = () => {
    if (frame) return state.stop();
    button.textContent = "❚❚ Stop";
    let last = performance.now();
    const advance = (now) => {
      state.tour = (state.tour + Math.min(now - last, 100) / 1400) % (2 * stops.length - 2);
      last = now;
      const place = state.tour < stops.length - 1 ? state.tour : 2 * stops.length - 2 - state.tour;
      const from = Math.min(Math.floor(place), stops.length - 2), share = place - from;
      state.pose = { ...between(stops[from], stops[from + 1], share), target: stops[share < 0.5 ? from : from + 1].target };
      changed();
      frame = requestAnimationFrame(advance);
    };
    frame = requestAnimationFrame(advance);
  };
}
