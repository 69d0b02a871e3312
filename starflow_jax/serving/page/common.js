// What the page's parts share: the model, the one session, and small helpers.

export const $ = (id) => document.getElementById(id);
export const page = { model: null, session: null };

export function say(text) { $("state").textContent = text; }
export function complain(text) { $("error").textContent = text; }
export function seconds(value) { return value < 10 ? `${value.toFixed(2)} s` : `${value.toFixed(0)} s`; }
export function bits(value) { return `${value.toFixed(3)} bits per dimension`; }

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

export async function base64(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768));
  return btoa(text);
}
