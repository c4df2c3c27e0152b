// The page's own script, beside Gradio's: what must work without the server, or when it has gone.
window.lora_tuner = (() => {
  const MAX_ADDRESS = 4000; // characters; a longer prompt is left out
  const MAX_PROMPTS = 30, MAX_PROMPT = 10000; // that are remembered; characters
  const CHECK_MS = 2000, PATIENCE_MS = 8000; // a busy server may take seconds to answer
  const PROMPTS = "lora_tuner.prompts", ANSWERS = "lora_tuner.answers", CONVERSATION = "lora_tuner.conversation";
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  const read = (storage, key, standard) => {
    try {
      return JSON.parse(storage.getItem(key)) ?? standard;
    } catch {
      return standard; // the browser keeps nothing, or another page has written there
    }
  };
  const write = (storage, key, value) => {
    try {
      storage.setItem(key, JSON.stringify(value));
    } catch {} // the browser keeps nothing
  };

  // Controls that depend on what the page shows.

  let scheduled = false;
  const schedule = () => {
    if (!scheduled) requestAnimationFrame(update);
    scheduled = true;
  };
  const update = () => {
    scheduled = false;
    for (const panel of all("[role=tabpanel]")) {
      const busy = panel.querySelector("[aria-busy=true]");
      for (const stop of all("button.while-busy", panel)) stop.disabled = !busy;
      for (const again of all("button.with-answers", panel)) again.disabled = !panel.querySelector(".answers");
    }
    all(".block input, .block textarea").forEach(markInvalid);
    keepTab();
  };
  const markInvalid = field => {
    const block = field.closest(".invalid");
    if (!block === !field.hasAttribute("aria-invalid")) return;
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
    if (!block) return;
    field.setAttribute("aria-invalid", "true");
    const problem = block.querySelector(".info-text");
    problem.id ||= `problem-${Math.random()}`;
    field.setAttribute("aria-describedby", problem.id); // some fields have a label of their own for screen readers
    const closed = field.closest("[data-testid=accordion-content]");
    if (closed && !field.offsetParent) closed.previousElementSibling.click();
    if (document.querySelector("[aria-invalid]") === field) setTimeout(() => field.focus());
  };

  // The address: the open tab and its values.

  const addresses = {};
  let openTab = null;
  const keepTab = () => {
    const tab = document.querySelector("[role=tab][aria-selected=true]")?.innerText.trim().toLowerCase();
    if (!tab || tab === openTab) return;
    if (openTab) replaceAddress(addresses[tab] ?? new URLSearchParams({ tab }));
    openTab = tab;
  };
  const replaceAddress = query => history.replaceState(history.state, "", `?${query}`);
  const keepAddress = (tab, defaults, values, seed) => {
    const query = new URLSearchParams({ tab });
    Object.keys(defaults).forEach((name, index) => {
      const value = values[index];
      if (Array.isArray(value)) (value.length ? value : [""]).forEach(each => query.append(name, each));
      else if (![null, undefined, "", defaults[name]].includes(value)) query.set(name, value);
    });
    if (seed && !query.has("seed")) query.set("seed", seed);
    if (`${query}`.length > MAX_ADDRESS) query.delete("prompt");
    addresses[tab] = query;
    if (tab === openTab) replaceAddress(query);
    return [];
  };
  const seeds = {};
  const newSeed = tab => { // of new answers; an error leaves those of before
    const seed = document.querySelector(`.answers[data-tab="${tab}"]`)?.dataset.seed;
    const isNew = seed !== seeds[tab];
    seeds[tab] = seed;
    return isNew ? seed : "";
  };

  // Earlier prompts, in this browser alone.

  const showPrompts = prompts => {
    const choices = prompts.map(prompt => [prompt.replace(/\s+/g, " ").slice(0, 100), prompt]);
    const update = { __type__: "update", visible: choices.length > 0 };
    return [{ ...update, choices, value: null }, update];
  };
  const earlierPrompts = () => {
    const prompts = read(localStorage, PROMPTS, []);
    return Array.isArray(prompts) ? prompts.filter(prompt => typeof prompt === "string") : [];
  };
  const rememberPrompt = prompt => {
    const others = earlierPrompts().filter(other => other !== prompt);
    const isKept = prompt.trim() && prompt.length <= MAX_PROMPT;
    const prompts = isKept ? [prompt, ...others].slice(0, MAX_PROMPTS) : others;
    write(localStorage, PROMPTS, prompts);
    return showPrompts(prompts);
  };
  const forgetPrompts = () => {
    write(localStorage, PROMPTS, []);
    return showPrompts([]);
  };

  // The conversation of this page, which the server keeps for a reload.

  const conversationKey = () => {
    const random = () => [...crypto.getRandomValues(new Uint8Array(16))].map(byte => byte.toString(16).padStart(2, "0"));
    const key = read(sessionStorage, CONVERSATION, null) ?? random().join("");
    write(sessionStorage, CONVERSATION, key);
    return [key];
  };

  // Copy an answer.

  const copy = async text => {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const area = document.createElement("textarea"); // over plain http from another machine
    area.value = text;
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    if (!isCopied) throw new Error("The browser refuses to copy.");
  };
  document.addEventListener("click", async event => {
    const button = event.target.closest?.("button.copy");
    if (!button) return;
    const text = button.closest("article").querySelector(".text").lastChild.textContent;
    const isCopied = await copy(text).then(() => true, () => false);
    button.focus();
    button.textContent = isCopied ? "Copied" : "Not copied: select the text";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });

  // A server that has gone.

  let isLost = false;
  const say = (text, className, role) => {
    all(".connection").forEach(line => line.remove());
    for (const panel of all("[role=tabpanel]")) {
      const line = document.createElement("p");
      line.className = `connection ${className}`;
      line.setAttribute("role", role);
      line.textContent = text;
      const output = panel.querySelector(".output");
      output ? output.before(line) : panel.prepend(line);
    }
  };
  const lose = () => {
    all("[aria-busy=true]").forEach(busy => busy.setAttribute("aria-busy", "false"));
    if (isLost) return;
    isLost = true;
    say("The server does not answer. What is shown here stays, and the page goes on when it is back.", "failure", "alert");
    // Gradio reloads the page once the server is back.
    write(sessionStorage, ANSWERS, document.querySelector(".answers[data-tab=write]")?.parentElement.innerHTML ?? "");
  };
  const find = () => {
    if (!isLost) return;
    isLost = false;
    write(sessionStorage, ANSWERS, null);
    sayBack();
  };
  const sayBack = () => {
    say("The server is back.", "note", "status");
    setTimeout(() => all(".connection").forEach(line => isLost || line.remove()), 10000);
  };
  const check = async () => {
    try {
      if (document.hidden && !isLost) return;
      const response = await fetch("health", { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
      await response.text(); // unread, it would hold one of the browser's few connections
      [502, 504].includes(response.status) ? lose() : find(); // of a proxy
    } catch {
      lose();
    } finally {
      setTimeout(check, CHECK_MS);
    }
  };
  const takeAnswers = value => {
    const answers = read(sessionStorage, ANSWERS, null);
    write(sessionStorage, ANSWERS, null);
    if (answers !== null) setTimeout(sayBack, 500);
    return [answers || value];
  };

  new MutationObserver(schedule).observe(document.body, {
    subtree: true, childList: true, attributes: true, attributeFilter: ["aria-busy", "aria-selected", "class"],
  });
  setTimeout(check, CHECK_MS);
  return { conversationKey, earlierPrompts: () => showPrompts(earlierPrompts()), forgetPrompts, keepAddress, newSeed, rememberPrompt, takeAnswers };
})();
