// What nodes with a view of their own share: the widget that holds it, and its size.

export const widgetOf = (node, name) => node?.widgets?.find((widget) => widget.name === name);

// Call an action behind a method of an object, which may have none.
export function after(object, name, action) {
  const before = object[name];
  object[name] = function () {
    const result = before?.apply(this, arguments);
    action.apply(this, arguments);
    return result;
  };
}

// Add a view, its `element` and its `height` in pixels, to a node.
export function addView(node, name, type, view) {
  const widget = node.addDOMWidget(name, type, view.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => view.height,
    getMaxHeight: () => view.height,
  });
  // Seen on the page only: neither in the saved workflow nor in the request.
  widget.serialize = false;
  // The page's side panel gives widgets of a chosen node its own width, on the node too.
  Object.defineProperty(widget, "width", { get: () => undefined, set: () => {} });
}

// Size a node for its view too.
export function layOut(node) {
  const [least, lowest] = node.computeSize();
  node.setSize([Math.max(node.size[0], least), Math.max(node.size[1], lowest)]);
  node.setDirtyCanvas?.(true, true);
}
