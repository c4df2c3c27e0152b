// The card of an adapter: relatives open their own, a download is asked for first, so that a refusal stands on the page.
// A link without "download" would end the page's connections.
element.addEventListener("click", async event => {
    const button = event.target.closest("button[data-name]"), link = event.target.closest("a[data-download]");
    if (button) trigger("select", {name: button.dataset.name});
    if (!link) return;
    event.preventDefault();
    const answer = await fetch(link.href, {method: "HEAD"});
    if (answer.ok) Object.assign(document.createElement("a"), {href: link.href, download: ""}).click();
    else trigger("select", {name: link.dataset.download});
});
