"use strict";
// What every page shares: small helpers, and the choice between light and dark.

function element(tag, values = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(values)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function picture(values) {
  const image = element("img", values);
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth <= 128));
  return image;
}

// Pages from files may have no storage; then a choice lasts as long as the page.
function remember(key, value) {
  try {
    if (value === undefined) return localStorage.getItem(key);
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, value);
  } catch (error) {
    console.info("nothing is remembered between visits:", error.message);
  }
  return null;
}

function setUpTheme(button) {
  const preferred = matchMedia("(prefers-color-scheme: dark)");
  let chosen = remember("diffalign-theme");
  const isDark = () => (chosen ? chosen === "dark" : preferred.matches);
  const show = () => {
    document.documentElement.style.colorScheme = chosen || "";
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
  };
  button.addEventListener("click", () => {
    const other = isDark() ? "light" : "dark";
    chosen = other === (preferred.matches ? "dark" : "light") ? null : other; // back to what the system prefers
    remember("diffalign-theme", chosen);
    show();
  });
  preferred.addEventListener("change", show);
  show();
}
