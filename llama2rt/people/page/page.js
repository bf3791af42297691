"use strict";
// Keys for what the page has already: each element names its own in data-key. Without this script
// everything is still there by Tab, arrows and Enter.

const typing = (element) =>
  element.matches("textarea, select, input:not([type=radio]):not([type=submit])");

function press(element) {
  if (element.matches("details")) {
    element.open = !element.open;
    const first = element.querySelector("select, input:not([type=hidden])");
    if (element.open && first) first.focus();
  } else {
    element.focus();
    element.click();
  }
}

document.addEventListener("keydown", (event) => {
  const form = document.getElementById("main");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    if (form) form.requestSubmit();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    document.activeElement.blur();
    return;
  }
  if (typing(event.target)) return;
  if (event.key === "Enter") {
    // Whatever has the focus knows its own Enter.
    if (form && event.target === document.body) form.requestSubmit();
    return;
  }
  const element = document.querySelector(`[data-key="${CSS.escape(event.key.toLowerCase())}"]`);
  if (element) {
    event.preventDefault();
    press(element);
  }
});

// One post a form: its nonce would make a second one harmless, but nobody should wait for it.
document.addEventListener("submit", (event) => {
  const buttons = event.target.querySelectorAll("button");
  setTimeout(() => buttons.forEach((button) => { button.disabled = true; }));
});
// A page that Back brings out of the browser's cache has its buttons again.
addEventListener("pageshow", () => {
  document.querySelectorAll("button").forEach((button) => { button.disabled = false; });
});
