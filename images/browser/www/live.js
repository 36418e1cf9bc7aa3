// The live view: connects at once, fits the window, comes back by itself, and shares the clipboard.
import RFB from "./core/rfb.js";

const RETRY_MS = 1000;
const CONTROL = 0xffe3, LETTER_V = 0x76;
const screen = document.getElementById("screen");
const note = document.getElementById("note");
const url = new URL("websockify", location.href.replace(/^http/, "ws"));
let rfb = null;

function connect() {
  rfb = new RFB(screen, url.href, { shared: true, wsProtocols: ["binary"] });
  rfb.scaleViewport = true;
  rfb.background = "#1c1e22";
  rfb.addEventListener("connect", () => { note.textContent = ""; rfb.focus(); });
  rfb.addEventListener("disconnect", () => {
    rfb = null;
    note.textContent = "The browser is away. Trying again…";
    setTimeout(connect, RETRY_MS);
  });
  // What is copied in there can be pasted here.
  rfb.addEventListener("clipboard", (event) => navigator.clipboard?.writeText(event.detail.text).catch(() => {}));
}

// What was copied here can be pasted in there. The keys of a paste are kept from noVNC, so that the page gets the
// event that carries the text, without asking anybody for a permission.
addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.altKey && event.key.toLowerCase() === "v") event.stopPropagation();
}, { capture: true });
addEventListener("paste", (event) => {
  const text = event.clipboardData?.getData("text/plain");
  if (!rfb) return;
  event.preventDefault();
  if (text) rfb.clipboardPasteFrom(text);
  rfb.sendKey(CONTROL, "ControlLeft", true);
  rfb.sendKey(LETTER_V, "KeyV", true);
  rfb.sendKey(LETTER_V, "KeyV", false);
  rfb.sendKey(CONTROL, "ControlLeft", false);
}, { capture: true });

connect();
